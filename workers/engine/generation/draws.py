"""The random numbers that rows draw their tokens by, made for several tokens at once.

A number is a function of the request's key, the row and the token's place alone, so it does not matter when
it is made, nor how often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workers.engine.generation.ticket import Row
from workers.engine.random import uniforms

# Philox costs as much for one as for these.
_AHEAD = 16


def drawn_by(rows: Sequence[Row]) -> list[float]:
    """One number in (0, 1) for the next token of each row."""
    places = [len(row.sample.token_ids) for row in rows]
    lacking = [
        (row, place)
        for row, place in zip(rows, places, strict=True)
        if not row.draws_from <= place < row.draws_from + len(row.draws)
    ]
    if lacking:
        _make([row for row, _ in lacking], [place for _, place in lacking])
    return [row.draws[place - row.draws_from] for row, place in zip(rows, places, strict=True)]


def _make(rows: Sequence[Row], places: Sequence[int]) -> None:
    places_in_request = [row.ticket.request.first_row + row.number for row in rows]
    numbers = np.repeat(np.array(places_in_request, np.int64), _AHEAD)
    tokens = (np.array(places, np.int64)[:, None] + np.arange(_AHEAD)).reshape(-1)
    keys = [row.ticket.request.key for row in rows for _ in range(_AHEAD)]
    made = uniforms(keys, numbers, tokens).reshape(len(rows), _AHEAD)
    for row, place, draws in zip(rows, places, made.tolist(), strict=True):
        row.draws_from, row.draws = place, draws
