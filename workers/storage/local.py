"""Storage in a local folder: write aside, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from schemas.errors import SignalError
from workers.storage.protocol import FileInfo


class LocalStorage:
    """Files below one root, readable by this user only."""

    def __init__(self, root: Path) -> None:
        """`root` is made when it is not there."""
        self.root = root
        self._aside = root / ".aside"
        self._aside.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, key: str, data: bytes) -> None:
        """See `Storage.write`."""
        target = self._path(key)
        with _disk():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._aside)
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(name, target)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def read(self, key: str) -> bytes | None:
        """See `Storage.read`."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, key: str) -> BinaryIO:
        """See `Storage.open`."""
        return self._path(key).open("rb")

    def stat(self, key: str) -> FileInfo | None:
        """See `Storage.stat`."""
        path = self._path(key)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileInfo(key, found.st_size, found.st_mtime) if path.is_file() else None

    def put_folder(self, key: str, folder: Path) -> None:
        """See `Storage.put_folder`."""
        target = self._path(key)
        with _disk():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in folder.rglob("*"):
                if path.is_file():
                    _sync(path)
            if target.exists():
                raise FileExistsError(key)
            os.rename(folder, target)
            _sync(target.parent)

    def list(self, prefix: str) -> list[FileInfo]:
        """See `Storage.list`."""
        base = self._path(prefix)
        files = [path for path in base.rglob("*") if path.is_file()] if base.is_dir() else []
        infos = [self.stat(path.relative_to(self.root).as_posix()) for path in files]
        return sorted((info for info in infos if info is not None), key=lambda info: info.key)

    def delete(self, prefix: str) -> None:
        """See `Storage.delete`."""
        path = self._path(prefix)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """See `Storage.scratch`."""
        with _disk():
            return Path(tempfile.mkdtemp(dir=self._aside))

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not key or any(part in ("", ".", "..") or "\x00" in part for part in parts):
            raise ValueError(f"not a storage key: {key!r}")
        return self.root.joinpath(*parts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SignalError("storage_full") from error
        raise
