"""The storage protocol: keys are relative paths with forward slashes, values are bytes or folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

# The file that makes a stored folder whole: it is stored last and goes first.
MANIFEST = "manifest.json"


class StorageAway(ConnectionError):
    """Storage does not answer, or refuses us, for now: a repeat may succeed."""


@dataclass(frozen=True)
class FileInfo:
    """A stored file: key, size in bytes, modification time (epoch seconds)."""

    key: str
    size: int
    modified_at: float


class Storage(Protocol):
    """Every write is whole or not there: a reader never sees half a file.

    A folder is there when its `manifest.json` is. What a writer left that died before it wrote the
    manifest may be listed where storage cannot rename (S3); who looks for folders looks for manifests.
    Any method raises ValueError for what is not a key, StorageAway (an OSError) when storage cannot be
    reached, and another OSError when it fails; all of them end in bounded time.
    """

    def write(self, key: str, data: bytes) -> None:
        """Store bytes, replacing what was there; once it returns they are durable.

        Raises SignalError storage_full.
        """

    def read(self, key: str) -> bytes | None:
        """The bytes, or None when there are none."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""

    def stat(self, key: str) -> FileInfo | None:
        """Size and time of one file, or None."""

    def put_folder(self, key: str, folder: Path) -> None:
        """Move a folder's files under `key`, which must not exist; the folder must hold manifest.json.

        Raises FileExistsError when there is one already, or another writer makes it right now;
        SignalError storage_full. `folder` may still be there after a failure.
        """

    def list(self, prefix: str) -> list[FileInfo]:
        """All files under a prefix, sorted by key."""

    def delete(self, prefix: str) -> None:
        """Delete a file or everything under a prefix; nothing there is no error.

        Manifests go first, so that no reader takes what is left of a folder for the folder.
        """

    def scratch(self, room: int = 0) -> Path:
        """A new empty folder on a local disk, with room for so many bytes, from which `put_folder` is cheap.

        Raises SignalError storage_full when there is no such room.

        The caller removes it if it is unused; those of processes that died are removed by later calls.
        """


def parts_of(key: str) -> list[str]:
    """A key's parts. Raises ValueError for what is no relative path or could leave the root."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") or "\x00" in part for part in parts):
        raise ValueError(f"not a storage key: {key!r}")
    return parts
