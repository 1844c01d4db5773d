"""The storage protocol: keys are relative paths with forward slashes, values are bytes or folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class FileInfo:
    """A stored file: key, size in bytes, modification time (epoch seconds)."""

    key: str
    size: int
    modified_at: float


class Storage(Protocol):
    """Every write is whole or not there: a reader never sees half a file or half a folder."""

    def write(self, key: str, data: bytes) -> None:
        """Store bytes, replacing what was there. Raises SignalError storage_full."""

    def read(self, key: str) -> bytes | None:
        """The bytes, or None when there are none."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""

    def stat(self, key: str) -> FileInfo | None:
        """Size and time of one file, or None."""

    def put_folder(self, key: str, folder: Path) -> None:
        """Move a folder's files under `key`, which must not exist. Raises FileExistsError."""

    def list(self, prefix: str) -> list[FileInfo]:
        """All files under a prefix, sorted by key."""

    def delete(self, prefix: str) -> None:
        """Delete a file or everything under a prefix; nothing there is no error."""

    def scratch(self) -> Path:
        """A new empty folder from which `put_folder` is cheap; the caller removes it if unused."""
