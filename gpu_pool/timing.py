"""When to act: how long nothing has changed, and when to ring for a run again. Pure.

Times are seconds of a monotonic clock, given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

# Without a word from the server for so long, silence says nothing about the worker.
_DEAF_AFTER_S = 5.0
_FIRST_RING_S = 1.0
_FIRST_RING_WHILE_RUNNING_S = 15.0
_LONGEST_PAUSE_S = 30.0


@dataclass
class Pulse:
    """Measures for how long a word has stayed the same, counting only the time in which a new one
    could have been heard."""

    _last: str = ""
    _since: float = 0.0
    _heard: float = float("-inf")

    def silent_s(self, word: str, now: float) -> float:
        """Seconds since the word last changed; call it whenever the server answered."""
        if word != self._last or now - self._heard > _DEAF_AFTER_S:
            self._since = now
        self._last, self._heard = word, now
        return now - self._since


@dataclass
class Bell:
    """Says when a run that has work, but makes no progress, is to be rung for."""

    _applied: int = -1
    _next: float = 0.0
    _pause: float = _FIRST_RING_S

    def due(self, applied: int, waiting: bool, running: bool, now: float) -> bool:
        """True when a ring is due: 1 s after the last progress (15 s while an operation runs), then
        at growing intervals, because a lost ring is rare and a busy worker is not."""
        if applied != self._applied or not waiting:
            self._applied = applied
            self._pause = _FIRST_RING_WHILE_RUNNING_S if running else _FIRST_RING_S
            self._next = now + self._pause
            return False
        if now < self._next:
            return False
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        self._next = now + self._pause
        return True
