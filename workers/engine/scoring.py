"""Log-probabilities as an answer: of targets, and of the likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.counted import counted, example_of

if TYPE_CHECKING:
    from workers.text.rows import Row


def wire_rows(
    rows: Sequence[Row], logprobs: Tensor, top_ids: Tensor | None, top_logprobs: Tensor | None
) -> list[dict[str, Any]]:
    """The rows of `schemas.results.ForwardResult` from the numbers of their counted entries, in order.

    `top_ids` and `top_logprobs` [N, K] are given both or not. Raises SignalError non_finite, which names the
    example.
    """
    _check_finite(rows, logprobs)
    own, found = iter(logprobs.tolist()), []
    ids, values = (None if top is None else iter(top.tolist()) for top in (top_ids, top_logprobs))
    for number, row in enumerate(rows):
        positions = counted([row]).positions.tolist()
        found.append(
            {
                "example": example_of(rows, number),
                "token_ids": list(row.tokens),
                "target_ids": _shaped(list(row.targets), row.width),
                "logprobs": _shaped([next(own) if w else None for w in row.weights], row.width),
                "top_token_ids": _at(len(row), positions, ids),
                "top_logprobs": _at(len(row), positions, values),
            }
        )
    return found


def scored_rows(rows: Sequence[Row], scores: Tensor) -> list[dict[str, Any]]:
    """Per trained row its `example` and the `logprobs` of its targets, in their shape, in nats.

    `scores` [E] are those of every entry of every row. Raises SignalError non_finite with the example's name.
    """
    trained = [number for number, row in enumerate(rows) if row.trained]
    sizes = [len(rows[number].weights) for number in trained]
    if len(scores) != sum(sizes):
        # Rows that only lend their log-probabilities were scored too.
        every = torch.split(scores, [len(row.weights) for row in rows])
        scores = torch.cat([every[number] for number in trained])
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        owner = int(np.searchsorted(np.cumsum(sizes), int(bad[0]), side="right"))
        raise SignalError("non_finite", param=f"batch_data.{example_of(rows, trained[owner])}")
    parts = torch.split(scores.cpu(), sizes)
    return [
        {
            "example": example_of(rows, number),
            "logprobs": _shaped(part.tolist(), rows[number].width),
        }
        for number, part in zip(trained, parts, strict=True)
    ]


def _check_finite(rows: Sequence[Row], logprobs: Tensor) -> None:
    bad = (~logprobs.isfinite()).nonzero()
    if len(bad):
        index = int(counted(rows).rows[int(bad[0])])
        raise SignalError("non_finite", param=f"batch_data.{example_of(rows, index)}")


def _at(length: int, positions: Sequence[int], found: Iterator[Any] | None) -> list[Any] | None:
    """One entry per position, None where nothing was computed; the K targets of one have the same."""
    if found is None:
        return None
    by_position = {position: next(found) for position in positions}
    return [by_position.get(position) for position in range(length)]


def _shaped(numbers: list[Any], width: int) -> list[Any]:
    if width == 1:
        return numbers
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]
