"""Reading an S3 object at any place, by GETs of ranges.

A window of the object is asked for and streamed, never held in memory. Windows grow while the reader goes
straight on, so that a header costs one small GET and a download few large ones.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workers.storage.protocol import StorageAway
from workers.storage.s3_errors import translated

if TYPE_CHECKING:
    from botocore.response import StreamingBody

FIRST_WINDOW, LARGEST_WINDOW = 1 << 20, 1 << 26
ATTEMPTS = 3
PAUSE_S = 0.2


class RangeReader(io.RawIOBase):
    """A raw, seekable, read-only stream of one version of one object; for one thread at a time."""

    def __init__(self, fetch: Callable[[int, int], StreamingBody], size: int) -> None:
        """`fetch(start, end)` answers with the bytes from start up to, not including, end."""
        self._fetch, self._size = fetch, size
        self._at = 0
        self._window = FIRST_WINDOW
        self._body: StreamingBody | None = None
        self._end = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place that the next read begins at."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; costs nothing until the next read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        place = base + offset
        if place < 0:
            raise ValueError(f"negative seek position {place}")
        if place != self._at:
            self._drop()
            self._at, self._window = place, FIRST_WINDOW
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as `buffer` holds; 0 at the end. Raises StorageAway."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._read(wanted)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Let go of the connection."""
        self._drop()
        super().close()

    def _read(self, wanted: int) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            # Requests are repeated by S3's library; a stream that breaks off is not.
            body = self._stream()
            try:
                return self._take(body, wanted)
            except StorageAway:
                self._drop()
                if attempt == ATTEMPTS:
                    raise
                time.sleep(PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def _stream(self) -> StreamingBody:
        if self._body is None:
            self._end = min(self._at + self._window, self._size)
            with translated():
                self._body = self._fetch(self._at, self._end)
        return self._body

    def _take(self, body: StreamingBody, wanted: int) -> bytes:
        with translated():
            data: bytes = body.read(min(wanted, self._end - self._at))
        if not data:
            raise StorageAway(f"S3 storage broke off at byte {self._at} of {self._size}")
        if self._at + len(data) == self._end:
            self._drop()
            self._window = min(2 * self._window, LARGEST_WINDOW)
        return data

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
