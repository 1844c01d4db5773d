"""Whose operation is next on a worker that several runs share: deficit round robin by tokens. Pure.

A run is served while it has credit. When nobody who waits has any, a new round gives everybody a quantum.
What an operation took is paid when it is over, so a long one leaves its run with debts, which are waited off
as long as others have work, and cost nothing when nobody has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

# Small, since to change over costs nothing: a run that waits is soon there.
QUANTUM = 1024
# What an operation without tokens, such as a step, counts at least.
LEAST = 256


class Turns:
    """The runs that wait, by their names, and what each may still take."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        """`quantum` is in tokens."""
        self._quantum = quantum
        self._ring: deque[str] = deque()
        self._credit: dict[str, int] = {}

    def wants(self, run_id: str) -> None:
        """The run has, or may have, something to do; a repeat changes nothing."""
        if run_id not in self._ring:
            self._ring.append(run_id)
        self._credit.setdefault(run_id, 0)

    def waits(self, run_id: str) -> bool:
        """Whether the run is known to have, or perhaps to have, something to do."""
        return run_id in self._ring

    def rests(self, run_id: str) -> None:
        """The run has nothing to do: credit cannot be saved up, debts stay."""
        if run_id in self._ring:
            self._ring.remove(run_id)
            self._credit[run_id] = min(0, self._credit[run_id])

    def forget(self, run_id: str) -> None:
        """The run has left."""
        self.rests(run_id)
        self._credit.pop(run_id, None)

    def next(self, among: Collection[str] | None = None) -> str | None:
        """The run whose turn it is, of those that wait (and are `among` these); None when none is."""
        waiting = [run_id for run_id in self._ring if among is None or run_id in among]
        if not waiting:
            return None
        if not any(self._credit[run_id] > 0 for run_id in waiting):
            self._new_rounds(waiting)
        return next(run_id for run_id in waiting if self._credit[run_id] > 0)

    def paid(self, run_id: str, tokens: int) -> None:
        """The run has executed an operation of so many tokens; without credit it goes to the end."""
        self._credit[run_id] = self._credit.get(run_id, 0) - max(tokens, LEAST)
        if self._credit[run_id] <= 0 and run_id in self._ring:
            self._ring.remove(run_id)
            self._ring.append(run_id)

    def _new_rounds(self, waiting: Collection[str]) -> None:
        """As many as one of them needs to have credit."""
        rounds = 1 + min(-self._credit[run_id] for run_id in waiting) // self._quantum
        for run_id in self._credit:
            credit = self._credit[run_id] + rounds * self._quantum
            self._credit[run_id] = credit if run_id in self._ring else min(0, credit)
