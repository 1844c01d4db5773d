"""What a loss counts in rows: the entries whose weight is not 0, as flat arrays on the host.

Knows nothing of how sequences are laid out for a forward pass: padded or packed, log-probabilities come
back in the order of these entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from workers.text.rows import Row

Array = np.ndarray


@dataclass(frozen=True)
class Counted:
    """N entries, rows one after another, positions ascending, the K targets of a position side by side.

    `rows` [N], `positions` [N] and `columns` [N] (0 to K - 1) say where each entry is, `targets` [N] which
    token, `weights` [N] (float64) with what weight; all int64 but the weights.
    """

    rows: Array
    positions: Array
    columns: Array
    targets: Array
    weights: Array

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, count: int) -> list[int]:
        """Entries of each of the `count` rows."""
        found: list[int] = np.bincount(self.rows, minlength=count).tolist()
        return found

    def array(self, rows: Sequence[Row], name: str) -> Array:
        """The rows' numbers `name` at each entry [N], float32. Raises KeyError where a row has none."""
        lengths = np.array([len(row) for row in rows])
        starts = np.cumsum(lengths) - lengths
        joined = np.concatenate(
            [np.frombuffer(memoryview(row.arrays[name]), np.float32) for row in rows]
        )
        found: Array = joined[starts[self.rows] + self.positions]
        return found


def counted(rows: Sequence[Row]) -> Counted:
    """The counted entries of `rows`, of which (of the rows) there is at least one."""
    weights = np.concatenate([np.frombuffer(memoryview(row.weights), np.float32) for row in rows])
    targets = np.concatenate([np.frombuffer(memoryview(row.targets), np.int32) for row in rows])
    sizes = np.array([len(row.weights) for row in rows])
    lengths = np.array([len(row) for row in rows])
    chosen = np.flatnonzero(weights)
    numbers = np.repeat(np.arange(len(rows)), sizes)[chosen]
    places = chosen - (np.cumsum(sizes) - sizes)[numbers]
    widths = (sizes // lengths)[numbers]
    return Counted(
        numbers,
        places // widths,
        places % widths,
        targets[chosen].astype(np.int64),
        weights[chosen].astype(np.float64),
    )


def of_every_entry(rows: Sequence[Row]) -> list[Row]:
    """The same rows with the weight 1 at every entry, so that all of them are counted."""
    return [_weighed(row, np.ones(len(row.weights), np.float32)) for row in rows]


def of_the_rest(rows: Sequence[Row]) -> list[Row]:
    """The same rows with the weight 1 at the entries that are not counted, and 0 at the others."""
    return [
        _weighed(row, (np.frombuffer(memoryview(row.weights), np.float32) == 0).astype(np.float32))
        for row in rows
    ]


def _weighed(row: Row, weights: Array) -> Row:
    return replace(row, weights=memoryview(weights.tobytes()).cast("f"))


def example_of(rows: Sequence[Row], number: int) -> int:
    """The place in the request's batch of the example that row `number` was made of."""
    found = rows[number].example
    return found if found >= 0 else number
