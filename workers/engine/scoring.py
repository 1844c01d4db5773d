"""Log-probabilities as an answer: of targets, and of the likeliest tokens, without a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine import logprob
from workers.engine.counted import counted
from workers.engine.decoder import Head

if TYPE_CHECKING:
    from workers.text.rows import Row


def top_logprobs(
    hidden: Tensor, targets: Tensor, head: Head, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For `hidden` [N, H] and `targets` [N]: log p(target) [N], and the `top_k` greatest [N, K] with ids.

    In nats, greatest first; in chunks, so that the logits of a whole batch are never held.
    """
    rows = max(1, logprob.CHUNK_ELEMENTS // head.weight.shape[0])
    parts = []
    for h, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logprobs = head.logits(h).log_softmax(1)
        top = logprobs.topk(min(top_k, logprobs.shape[1]), dim=1)
        parts.append((logprobs.gather(1, y.unsqueeze(1)).squeeze(1), top.values, top.indices))
    own, values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return own, values, indices


def wire_rows(
    rows: Sequence[Row], logprobs: Tensor, top: Sequence[Tensor] | None
) -> list[dict[str, Any]]:
    """The rows of `schemas.results.ForwardResult` from the numbers of their counted entries, in order.

    `top` are log-probabilities and ids [N, K]. Raises SignalError non_finite, which names the example.
    """
    _check_finite(rows, logprobs)
    own, found = iter(logprobs.tolist()), []
    # An iterator of no entries, where nothing of the kind was asked for.
    values, ids = (iter(()), iter(())) if top is None else (iter(one.tolist()) for one in top)
    for number, row in enumerate(rows):
        positions = counted([row]).positions.tolist()
        found.append(
            {
                "example": row.example if row.example >= 0 else number,
                "token_ids": list(row.tokens),
                "target_ids": _shaped(list(row.targets), row.width),
                "logprobs": _shaped([next(own) if w else None for w in row.weights], row.width),
                "top_token_ids": None if top is None else _at(len(row), positions, ids),
                "top_logprobs": None if top is None else _at(len(row), positions, values),
            }
        )
    return found


def _check_finite(rows: Sequence[Row], logprobs: Tensor) -> None:
    bad = (~logprobs.isfinite()).nonzero()
    if len(bad):
        index = int(counted(rows).rows[int(bad[0])])
        example = rows[index].example
        raise SignalError("non_finite", param=f"batch_data.{example if example >= 0 else index}")


def _at(length: int, positions: Sequence[int], found: Iterator[Any]) -> list[Any]:
    """One entry per position, None where nothing was computed; the K targets of one have the same."""
    by_position = {position: next(found) for position in positions}
    return [by_position.get(position) for position in range(length)]


def _shaped(numbers: list[Any], width: int) -> list[Any]:
    if width == 1:
        return numbers
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]
