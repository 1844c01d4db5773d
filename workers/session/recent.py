"""What a session has committed lately, so that a journal that lost it can be mended.

Kept since the last sealed seq, because everything before that is in storage. Pure but for a lock: the
snapshot thread lets go of what it has sealed.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from workers.queue.records import Past


@dataclass(frozen=True)
class Commit:
    """An entry as it was committed, with what the projector was told of it."""

    past: Past
    data: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes that it holds in memory, roughly."""
        return len(self.past.body) + len(self.past.result) + 500


class Recent:
    """Commits of consecutive seqs, oldest first, within a bound of bytes."""

    def __init__(self, known_from: int, max_bytes: int) -> None:
        """Nothing after `known_from` is known yet."""
        self._lock = threading.Lock()
        self._commits: deque[Commit] = deque()
        self._bytes, self._max_bytes = 0, max_bytes
        self._known_from = known_from

    def add(self, commit: Commit) -> None:
        """The next seq."""
        with self._lock:
            self._commits.append(commit)
            self._bytes += commit.size
            while self._bytes > self._max_bytes:
                self._drop()

    def forget(self, upto: int) -> None:
        """Let go of everything up to a seq."""
        with self._lock:
            while self._commits and self._commits[0].past.seq <= upto:
                self._drop()

    def reset(self, known_from: int) -> None:
        """Begin anew after a seq."""
        with self._lock:
            self._commits.clear()
            self._bytes, self._known_from = 0, known_from

    def all(self) -> tuple[int, list[Commit]]:
        """The seq after which they begin, and the commits."""
        with self._lock:
            return self._known_from, list(self._commits)

    def _drop(self) -> None:
        first = self._commits.popleft()
        self._bytes -= first.size
        self._known_from = first.past.seq
