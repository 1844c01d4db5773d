"""Notices that the kernel killed a process of this control group for its memory.

Reads the counter of the control group that the agent and its workers share (version 2 or 1), or, where
there is none, that of the whole machine. Touches nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

# How long after the kernel's kill the process may be seen to end.
_RECENT_S = 5.0


class OutOfMemory:
    """Counts the kernel's kills; each may be claimed for one death. Safe to use from several threads."""

    def __init__(self, counter: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`counter` is a file that has a line "oom_kill N", as `find_counter` finds it."""
        self._counter, self._clock, self._lock = counter, clock, Lock()
        self._count = self._read()
        self._unclaimed: list[float] = []

    def look(self) -> None:
        """Notes when the counter rose. To be called often, so that an old kill is not taken for a new."""
        with self._lock:
            self._look()

    def claim(self) -> bool:
        """True when there was a kill just now that no other death has claimed."""
        with self._lock:
            self._look()
            if not self._unclaimed:
                return False
            self._unclaimed.pop()
            return True

    def _look(self) -> None:
        now, count = self._clock(), self._read()
        self._unclaimed += [now] * max(0, count - self._count)
        self._unclaimed = [at for at in self._unclaimed if now - at <= _RECENT_S]
        self._count = count

    def _read(self) -> int:
        return _count(self._counter) or 0 if self._counter is not None else 0


def find_counter(
    own: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
    machine: Path = Path("/proc/vmstat"),
) -> Path | None:
    """The file that counts the kills among which a worker of ours would be; None when none does."""
    for candidate in (*_group_files(own, root), machine):
        if _count(candidate) is not None:
            return candidate
    return None


def _group_files(own: Path, root: Path) -> Iterator[Path]:
    """The group's own file, as this process sees it; in a container it is that of the root."""
    try:
        rows = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in rows:
        if "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.oom_control"
        elif not controllers:
            folder, name = root, "memory.events"
        else:
            continue
        yield folder / group.lstrip("/") / name
        yield folder / name


def _count(file: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
