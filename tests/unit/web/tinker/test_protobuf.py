"""Messages are what the SDK's own protobuf types read and write."""

from __future__ import annotations

import struct

import pytest
from tinker.proto import tinker_public_pb2 as pb

from web.tinker import protobuf
from web.tinker.protobuf import Malformed, fields


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**31 - 1, 2**32 - 1])
def test_integers_are_read_as_they_were_written(value: int) -> None:
    written = pb.TopkLogprobs(k=value).SerializeToString()
    assert [protobuf.int_of(v) for _, v in fields(memoryview(written))] == (
        [value] if value else []
    )
    assert pb.TopkLogprobs.FromString(protobuf.put_int(3, value)).k == value


@pytest.mark.parametrize("value", [-1, -(2**31), 5])
def test_negative_integers(value: int) -> None:
    written = pb.ForwardBackwardRequest(seq_id=value).SerializeToString()
    ((number, found),) = fields(memoryview(written))
    assert (number, protobuf.int_of(found, 32)) == (2, value)


def test_repeated_integers_packed_or_not() -> None:
    packed = pb.Tensor(shape=[3, 300, 0]).SerializeToString()
    ((_, value),) = fields(memoryview(packed))
    assert protobuf.ints_of(value) == [3, 300, 0]
    loose = protobuf.put_int(4, 3) + protobuf.put_int(4, 300)
    assert list(pb.Tensor.FromString(loose).shape) == [3, 300]
    assert [protobuf.ints_of(v) for _, v in fields(memoryview(loose))] == [[3], [300]]
    assert list(pb.BatchedTensor.FromString(protobuf.put_ints(4, [2, 500])).trailing_shape) == [
        2,
        500,
    ]


def test_texts_blocks_and_doubles() -> None:
    entry = protobuf.put_text(1, "Größe") + protobuf.put_double(2, 0.1)
    read = pb.ForwardBackwardOutput.FromString(protobuf.put_block(3, entry))
    assert dict(read.metrics) == {"Größe": 0.1}
    (name, number) = (value for _, value in fields(memoryview(entry)))
    assert (protobuf.text_of(name), protobuf.double_of(number)) == ("Größe", 0.1)


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # a tag without its value
        b"\xff" * 11,  # a varint without an end
        b"\x0a\x05abc",  # shorter than it says
        b"\x0b",  # a group, which nobody writes any more
        b"\x09\x00",  # a double of one byte
    ],
)
def test_what_is_no_message_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(Malformed):
        list(fields(memoryview(data)))


def test_values_of_another_type_are_refused() -> None:
    with pytest.raises(Malformed):
        protobuf.block_of(5)
    with pytest.raises(Malformed):
        protobuf.int_of(memoryview(b"abc"))
    with pytest.raises(Malformed):
        protobuf.double_of(memoryview(struct.pack("<f", 1.0)))
    with pytest.raises(Malformed):
        protobuf.text_of(memoryview(b"\xff"))
