"""The place for what is not whole yet: one folder per process that dies with the process.

Each process keeps a lock on its folder, which the kernel lets go of however the process ends; the next
one to ask for a scratch folder removes the folders whose lock is free. Touches one folder, never keys.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schemas.errors import SignalError

RESERVE_BYTES = 256 * 1024 * 1024
_GATE, _ALIVE = "gate", "alive"


class Aside:
    """Temporary files and folders on one file system."""

    def __init__(self, root: Path) -> None:
        """Nothing is made before the first use."""
        self.root = root
        self._own: Path | None = None
        self._lock = threading.Lock()

    def folder(self) -> Path:
        """This process's folder."""
        with self._lock:
            if self._own is None or not self._own.is_dir():
                self._own = self._make()
            return self._own

    def scratch(self, room: int = 0) -> Path:
        """A new empty folder; what dead processes left is removed first.

        Raises SignalError storage_full when the disk has no place for `room` bytes and a reserve.
        """
        with full_disk_is_named():
            self.sweep()
            make_folders(self.root)
            if room > 0:
                _check_room(self.root, room)
            return Path(tempfile.mkdtemp(dir=self.folder()))

    def name(self) -> Path:
        """A path in this process's folder that nothing has."""
        return self.folder() / secrets.token_hex(8)

    def sweep(self) -> None:
        """Remove the folders of processes that have ended."""
        if not self.root.is_dir():
            return
        with self._gate():
            dead = [path for path in self.root.iterdir() if path.is_dir() and not _alive(path)]
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)

    def _make(self) -> Path:
        make_folders(self.root)
        # Within the gate nobody sees a folder that is not locked yet.
        with self._gate():
            own = Path(tempfile.mkdtemp(dir=self.root))
            descriptor = os.open(own / _ALIVE, os.O_RDWR | os.O_CREAT, 0o600)
            weakref.finalize(self, _let_go, descriptor, own, os.getpid()).atexit = False
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return own

    @contextmanager
    def _gate(self) -> Iterator[None]:
        descriptor = os.open(self.root / _GATE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _check_room(folder: Path, room: int) -> None:
    # A snapshot that is begun and fails takes the last bytes for a moment, and with them those of the
    # Redis-protocol server's append-only file, which lies on the same disk.
    disk = shutil.disk_usage(folder)
    if disk.free < room + min(RESERVE_BYTES, disk.total // 50):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _let_go(descriptor: int, own: Path, pid: int) -> None:
    # Who holds a scratch folder may have forgotten where it came from: then the lock stays until the process
    # ends. A fork leaves all to its parent.
    if os.getpid() == pid and (not own.is_dir() or os.listdir(own) == [_ALIVE]):
        shutil.rmtree(own, ignore_errors=True)
        os.close(descriptor)


def _alive(path: Path) -> bool:
    try:
        descriptor = os.open(path / _ALIVE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def full_disk_is_named() -> Iterator[None]:
    """Raises SignalError storage_full for a full disk or quota."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SignalError("storage_full") from error
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """`mkdir -p`, readable by this user only, and durable."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    sync(path.parent)
