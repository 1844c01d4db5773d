"""Storage in a local folder: write aside, fsync, rename, fsync the folder that it was renamed into."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from workers.storage.aside import Aside, full_disk_is_named, make_folders, sync
from workers.storage.protocol import MANIFEST, FileInfo, parts_of

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalStorage:
    """Files below one root, readable by this user only."""

    def __init__(self, root: Path) -> None:
        """`root` is made when it is first written to."""
        self.root = root
        self._aside = Aside(root / ".aside")

    def write(self, key: str, data: bytes) -> None:
        """See `Storage.write`."""
        target = self._path(key)
        with full_disk_is_named():
            handle, name = tempfile.mkstemp(dir=self._aside.folder())
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
                make_folders(target.parent)
                os.replace(name, target)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            sync(target.parent)

    def read(self, key: str) -> bytes | None:
        """See `Storage.read`."""
        try:
            return self._path(key).read_bytes()
        except _NOT_THERE:
            return None

    def open(self, key: str) -> BinaryIO:
        """See `Storage.open`."""
        try:
            return self._path(key).open("rb")
        except _NOT_THERE as error:
            raise FileNotFoundError(errno.ENOENT, "no such file in storage", key) from error

    def stat(self, key: str) -> FileInfo | None:
        """See `Storage.stat`."""
        path = self._path(key)
        try:
            found = path.stat()
        except _NOT_THERE:
            return None
        return FileInfo(key, found.st_size, found.st_mtime) if path.is_file() else None

    def put_folder(self, key: str, folder: Path) -> None:
        """See `Storage.put_folder`."""
        target = self._path(key)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} has no {MANIFEST}")
        with full_disk_is_named():
            for path in (*folder.rglob("*"), folder):
                sync(path)
            make_folders(target.parent)
            if target.exists():
                raise FileExistsError(errno.EEXIST, "storage has this folder", key)
            try:
                os.rename(folder, target)
            except OSError as error:
                # Another writer was a moment faster.
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "storage has this folder", key) from error
                raise
            try:
                sync(target.parent)
            except OSError:
                # What is not durable was not stored: a repeat must not find it taken.
                (target / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                raise

    def list(self, prefix: str) -> list[FileInfo]:
        """See `Storage.list`."""
        keys = [path.relative_to(self.root).as_posix() for path in _files(self._path(prefix))]
        infos = (self.stat(key) for key in sorted(keys))
        return [info for info in infos if info is not None]

    def delete(self, prefix: str) -> None:
        """See `Storage.delete`."""
        path = self._path(prefix)
        if path.is_dir():
            self._delete_folder(path)
        else:
            with suppress(*_NOT_THERE):
                path.unlink()

    def scratch(self, room: int = 0) -> Path:
        """See `Storage.scratch`."""
        return self._aside.scratch(room)

    def _delete_folder(self, path: Path) -> None:
        try:
            doomed = self._aside.name()
            os.rename(path, doomed)
        except OSError:
            # Gone already, or a disk so full that it takes no new name: deleting must help all the same.
            doomed = path
            for manifest in path.rglob(MANIFEST):
                manifest.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync(path.parent)
            shutil.rmtree(doomed)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*parts_of(key))


def _files(base: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(base, onerror=_not_there_is_empty):
        yield from (Path(folder, name) for name in names)


def _not_there_is_empty(error: OSError) -> None:
    # Others may delete while we list.
    if not isinstance(error, _NOT_THERE):
        raise error
