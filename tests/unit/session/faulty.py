"""A storage that fails at a chosen moment, and one that is not atomic, as a store without renames is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.storage import LocalStorage


class Broken(Exception):
    """What stands for the death of the process: no handler for errors of storage catches it."""


def full_disk() -> OSError:
    """No space left on device."""
    return OSError(errno.ENOSPC, "No space left on device")


class Faulty(LocalStorage):
    """Raises at its nth call of any method that a writer uses; counts all of them."""

    def __init__(self, root: Path, fail_at: int, error: Callable[[], BaseException]) -> None:
        """`fail_at` is counted from 1; 0 never fails."""
        super().__init__(root)
        self.calls: list[str] = []
        self._fail_at, self._error = fail_at, error

    def __getattribute__(self, name: str) -> Any:
        """Counts the method `name`."""
        if name in ("scratch", "put_folder", "read", "open", "list", "stat"):
            self.calls.append(name)
            if len(self.calls) == self._fail_at:
                raise self._error()
        return super().__getattribute__(name)


class OneByOne(LocalStorage):
    """Stores a folder file by file in the given order and stops after `stop` of them."""

    def __init__(self, root: Path, order: list[str], stop: int) -> None:
        """`order` are the files' names."""
        super().__init__(root)
        self._order, self._stop = order, stop
        self.dead = False

    def put_folder(self, key: str, folder: Path) -> None:
        """See `Storage.put_folder`."""
        for number, name in enumerate(self._order):
            if number == self._stop:
                self.dead = True
                raise Broken
            self.write(f"{key}/{name}", (folder / name).read_bytes())

    def delete(self, prefix: str) -> None:
        """The dead delete nothing."""
        if self.dead:
            raise OSError(errno.ESHUTDOWN, "dead")
        super().delete(prefix)
