"""Which run's operation a worker executes at this moment, to be read after the worker's death.

A few bytes of a file that the worker maps into its memory: a note costs no system call, and it outlives
whatever ends the process. Touches that file.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_SIZE = 64


class Executing:
    """The worker's side."""

    def __init__(self, path: Path) -> None:
        """Where the file cannot be made (a full disk), a death will blame nobody."""
        self.now = ""
        self._map: mmap.mmap | None = None
        try:
            with path.open("w+b") as file:
                # Written, not only made longer: a page without a block on the disk may be refused later.
                file.write(bytes(_SIZE))
                file.flush()
                self._map = mmap.mmap(file.fileno(), _SIZE)
        except OSError as error:
            log.warning("it cannot be noted what is executed: %s", error)

    @contextmanager
    def of(self, run_id: str) -> Iterator[None]:
        """Inside the block this run's operation is executed; one that stood still for it goes on after."""
        before = self.now
        self._note(run_id)
        try:
            yield
        finally:
            self._note(before)

    def _note(self, run_id: str) -> None:
        self.now = run_id
        if self._map is not None:
            self._map[:] = run_id.encode()[:_SIZE].ljust(_SIZE, b"\0")


def path_of(logs: Path, node: str) -> Path:
    """The file of a worker, beside its log."""
    return logs / f"{node}.now"


def last_executed(path: Path) -> str:
    """The run whose operation a worker was executing when it was last heard of; "" for none."""
    try:
        return path.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""
