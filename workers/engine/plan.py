"""The plan of an operation: which rows go through the model together, in which order, by which kernel.

All of it changes rounding and nothing else, so it is recorded with the operation and a replay uses it. A unit
is a list of rows that a loss looks at together; it is never split. Plain JSON outside, row numbers inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from schemas.errors import SignalError

Unit = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """`batches` of units of row numbers, longest first, and the attention `kernel` by the decoder's name."""

    batches: tuple[tuple[Unit, ...], ...]
    kernel: str

    def to_json(self) -> dict[str, Any]:
        """What a commit records."""
        batches = [[list(unit) for unit in batch] for batch in self.batches]
        return {"batches": batches, "kernel": self.kernel}

    @classmethod
    def from_json(cls, found: Any, units: Sequence[Unit]) -> Plan:
        """The reverse. Raises SignalError state_mismatch for what is no plan of just these units."""
        try:
            batches = tuple(
                tuple(tuple(int(row) for row in unit) for unit in batch)
                for batch in found["batches"]
            )
            kernel = str(found["kernel"])
        except (KeyError, TypeError, ValueError):
            raise _mismatch() from None
        if not all(batches) or sorted(unit for batch in batches for unit in batch) != sorted(units):
            raise _mismatch()
        return cls(batches, kernel)

    def halved(self, number: int) -> Plan | None:
        """The plan with batch `number` in two, about equal in tokens as units are sorted; None for one
        unit."""
        batch = self.batches[number]
        if len(batch) < 2:
            return None
        middle = len(batch) // 2
        parts = (batch[:middle], batch[middle:])
        return replace(self, batches=self.batches[:number] + parts + self.batches[number + 1 :])


def make_plan(
    lengths: Sequence[int],
    budget: int,
    kernel: str,
    units: Sequence[Unit] | None = None,
    *,
    padded: bool = False,
) -> Plan:
    """Units (by default each row by itself) longest first, as many together as `budget` tokens hold.

    A unit that is larger by itself is a batch of its own. Equal lengths come to lie side by side.
    `padded`: each row takes as much as the longest of its batch.
    """
    whole = units if units is not None else [(row,) for row in range(len(lengths))]
    size = {unit: sum(lengths[row] for row in unit) for unit in whole}
    order = sorted(whole, key=lambda unit: (-size[unit], unit))
    batches: list[tuple[Unit, ...]] = []
    batch: list[Unit] = []
    rows, longest, held = 0, 0, 0
    for unit in order:
        rows, held = rows + len(unit), held + size[unit]
        longest = max(longest, *(lengths[row] for row in unit))
        if batch and (rows * longest if padded else held) > budget:
            batches.append(tuple(batch))
            batch, rows, held = [], len(unit), size[unit]
            longest = max(lengths[row] for row in unit)
        batch.append(unit)
    return Plan((*batches, tuple(batch)), kernel)


def _mismatch() -> SignalError:
    return SignalError(
        "state_mismatch", "The recorded plan of this operation is not one of its rows."
    )
