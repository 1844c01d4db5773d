"""What needs no server of storage in S3: its errors in our words, and reading by ranges."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
)

from schemas.errors import SignalError
from workers.storage import StorageAway
from workers.storage.s3_errors import translated
from workers.storage.s3_reader import FIRST_WINDOW, LARGEST_WINDOW, RangeReader


def answer(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "PutObject",
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answer(503, "SlowDown"), StorageAway),
        (answer(500, "InternalError"), StorageAway),
        (answer(403, "AccessDenied"), StorageAway),
        (answer(403, "403"), StorageAway),
        (answer(400, "ExpiredToken"), StorageAway),
        (answer(404, "NoSuchBucket"), StorageAway),
        (answer(301, "PermanentRedirect"), StorageAway),
        (answer(409, "OperationAborted"), StorageAway),
        (answer(507, ""), SignalError),
        (answer(403, "QuotaExceeded"), SignalError),
        (answer(404, "NoSuchKey"), FileNotFoundError),
        (answer(400, "InvalidArgument"), OSError),
        (EndpointConnectionError(endpoint_url="http://s3"), StorageAway),
        (NoCredentialsError(), StorageAway),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), StorageAway),
        (ConnectionResetError(), StorageAway),
        (FileExistsError(), FileExistsError),
        (ParamValidationError(report="a fault of ours"), ParamValidationError),
    ],
)
def test_every_failure_is_one_that_callers_know(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as found, translated():
        raise error
    assert type(found.value) is kind
    if isinstance(found.value, SignalError):
        assert found.value.code == "storage_full"


def reader_of(data: bytes, asked: list[tuple[int, int]]) -> RangeReader:
    def fetch(start: int, end: int) -> Any:
        asked.append((start, end))
        return io.BytesIO(data[start:end])

    return RangeReader(fetch, len(data))


def test_windows_grow_while_reading_goes_straight_on() -> None:
    asked: list[tuple[int, int]] = []
    data = bytes(8 * FIRST_WINDOW)
    reader = reader_of(data, asked)
    while reader.read(100_000):
        pass
    sizes = [end - start for start, end in asked]
    assert sizes == [FIRST_WINDOW, 2 * FIRST_WINDOW, 4 * FIRST_WINDOW, FIRST_WINDOW]
    reader.seek(0)
    reader.read(10)
    assert asked[-1] == (0, FIRST_WINDOW)
    assert FIRST_WINDOW < LARGEST_WINDOW


def test_a_seek_costs_nothing() -> None:
    asked: list[tuple[int, int]] = []
    reader = reader_of(b"0123456789", asked)
    assert reader.seek(0, io.SEEK_END) == 10 and reader.seek(-4, io.SEEK_CUR) == 6
    assert asked == []
    assert reader.read(2) == b"67" and reader.seek(8) == 8 and reader.read() == b"89"
    assert asked == [(6, 10)]
    with pytest.raises(ValueError, match="negative"):
        reader.seek(-1)


@pytest.mark.parametrize(("failures", "reads"), [(2, True), (3, False)])
def test_a_broken_stream_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, reads: bool
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    left = iter([Broken] * failures)

    def fetch(start: int, end: int) -> Any:
        broken = next(left, None)
        return broken() if broken else io.BytesIO(b"0123"[start:end])

    reader = RangeReader(fetch, 4)
    if reads:
        assert reader.read() == b"0123"
    else:
        with pytest.raises(StorageAway):
            reader.read()
    assert len(waits) == 2


class Broken(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise IncompleteReadError(actual_bytes=0, expected_bytes=4)
