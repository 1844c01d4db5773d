"""Requests that the SDK has written are read as they were meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from schemas.errors import SignalError
from web.tinker.datums import Datum, datums_of, read_request


def written(*data: types.Datum, **fields: Any) -> bytes:
    """By the SDK's own code."""
    inputs = ForwardBackwardInput(
        data=list(data),
        loss_fn=fields.pop("loss_fn", "cross_entropy"),
        loss_fn_config=fields.pop("config", None),
    )
    request = ForwardBackwardRequest(
        model_id="ses_1:train:0", seq_id=7, forward_backward_input=inputs
    )
    found: bytes = forward_backward_request_to_proto(request).SerializeToString()
    return found


def datum(ids: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(ids), loss_fn_inputs=inputs)


def read_one(body: bytes) -> Datum:
    (found,) = datums_of(read_request(body))
    return found


def refused(body: bytes) -> SignalError:
    with pytest.raises(SignalError) as caught:
        datums_of(read_request(body))
    return caught.value


def test_a_request_of_the_sdk() -> None:
    data = datum(
        [5, 6, 7],
        target_tokens=types.TensorData(data=[6, 7, 8], dtype="int64", shape=[3]),
        weights=types.TensorData(data=[0.0, 1.0, 0.5], dtype="float32", shape=[3]),
    )
    request = read_request(written(data, config={"beta": 0.5, "mode": "x"}))
    assert (request.model_id, request.seq_id, request.loss_fn) == (
        "ses_1:train:0",
        7,
        "cross_entropy",
    )
    assert request.config == {"beta": 0.5, "mode": "x"}
    assert request.forward_only is False
    (found,) = datums_of(request)
    assert list(found.tokens) == [5, 6, 7]
    assert list(found.inputs["target_tokens"].data) == [6, 7, 8]
    assert found.inputs["target_tokens"].shape == (3,) and found.inputs["target_tokens"].whole
    assert list(found.inputs["weights"].data) == [0.0, 1.0, 0.5]


def test_several_chunks_are_one_sequence() -> None:
    data = types.Datum(
        model_input=types.ModelInput(
            chunks=[types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
        ),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[1, 2, 3], dtype="int64")},
    )
    assert list(read_one(written(data)).tokens) == [1, 2, 3]


def test_a_sparse_tensor_is_made_dense() -> None:
    sparse = types.TensorData(
        data=[0.5, 0.25, 1.0],
        dtype="float32",
        shape=[4, 6],
        sparse_crow_indices=[0, 1, 1, 2, 3],
        sparse_col_indices=[1, 5, 0],
    )
    found = read_one(written(datum([1, 2, 3, 4], weights=sparse))).inputs["weights"]
    dense = [0.0] * 24
    dense[1], dense[17], dense[18] = 0.5, 0.25, 1.0
    assert (found.shape, list(found.data)) == ((4, 6), dense)


def test_an_older_configuration_is_read_where_there_is_no_newer_one() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="dro")
    message.loss_fn_config["beta"] = 0.25
    assert read_request(message.SerializeToString()).config == {"beta": 0.25}
    # A text of six letters is as long as a number.
    message.loss_fn_config_v2["beta"].text = "sixsix"
    assert read_request(message.SerializeToString()).config == {"beta": "sixsix"}


def test_forward_only() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, forward_only=True)
    assert read_request(message.SerializeToString()).forward_only is True


def test_images_and_spans_are_refused_by_name() -> None:
    image = types.Datum(
        model_input=types.ModelInput(
            chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)]
        ),
        loss_fn_inputs={},
    )
    error = refused(written(datum([1]), image))
    assert (error.code, error.param) == ("not_supported", "data.1.model_input")
    assert "image" in error.message
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1)
    message.data.add().model_input_spans.add().prompt_tokens.length = 1
    error = refused(message.SerializeToString())
    assert (error.code, error.param) == ("not_supported", "data.0.model_input_spans")


def _sparse(crow: list[int], columns: list[int], shape: list[int]) -> bytes:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1)
    tensor = message.data.add().loss_fn_inputs["weights"]
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = np.ones(len(columns), np.float32).tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.array(columns, np.int64).tobytes()
    found: bytes = message.SerializeToString()
    return found


@pytest.mark.parametrize(
    "body",
    [
        _sparse([0, 1], [2], [1, 2]),  # a column outside
        _sparse([0, 2], [0], [1, 2]),  # more than there are
        _sparse([0, 1, 1], [0], [1, 2]),  # a row too many
        _sparse([0, 1], [0], [1]),  # no columns at all
        _sparse([0, 1], [0], [1 << 20, 1 << 20]),  # a few bytes that would fill the memory
    ],
)
def test_a_sparse_tensor_that_is_none_is_refused(body: bytes) -> None:
    error = refused(body)
    assert (error.code, error.param) == ("validation_error", "data.0.loss_fn_inputs.weights")


def test_a_shape_that_does_not_fit_is_refused() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1)
    tensor = message.data.add().loss_fn_inputs["weights"]
    tensor.dtype, tensor.dense = pb.DTYPE_FLOAT32, bytes(8)
    tensor.shape.extend([3])
    assert refused(message.SerializeToString()).param == "data.0.loss_fn_inputs.weights"
    tensor.dense = bytes(7)
    assert refused(message.SerializeToString()).param == "data.0.loss_fn_inputs.weights"
    tensor.dtype = pb.DTYPE_UNSPECIFIED
    assert "dtype" in refused(message.SerializeToString()).message


@pytest.mark.parametrize("body", [b"\xff\xff", b"{}", b"\x1a\x05abc"])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(SignalError) as caught:
        read_request(body)
    assert caught.value.code == "bad_request"
