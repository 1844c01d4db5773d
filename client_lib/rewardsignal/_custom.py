"""A loss that the client computes: log-probabilities in, gradients out as rows of the loss `custom`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewardsignal._schemas import ForwardRow

# From the rows of a forward, whose `logprobs` are shaped as their `target_ids` and None where nothing counts:
# the loss, and its gradient by each log-probability in the same shapes.
CustomLoss = Callable[[Sequence[ForwardRow]], tuple[float, Sequence[Sequence[Any]]]]


def differentiated(
    loss: CustomLoss, rows: Sequence[ForwardRow]
) -> tuple[float, list[dict[str, Any]]]:
    """The loss of `rows`, and the batch whose gradient under `custom` is the loss's own.

    Raises ValueError unless the gradients have the shapes of the log-probabilities.
    """
    value, gradients = loss(rows)
    if len(gradients) != len(rows):
        raise ValueError(f"The loss gave gradients of {len(gradients)} rows, not of {len(rows)}.")
    return float(value), [
        {
            "tokens": row.token_ids,
            "targets": row.target_ids,
            "weights": _weights(row.logprobs, gradient),
        }
        for row, gradient in zip(rows, gradients, strict=True)
    ]


def _weights(logprobs: Sequence[Any], gradient: Sequence[Any]) -> list[Any]:
    if len(logprobs) != len(gradient):
        raise ValueError(f"A gradient has {len(gradient)} entries, its row has {len(logprobs)}.")
    return [
        _weights(own, slope) if isinstance(own, list) else 0.0 if own is None else float(slope)
        for own, slope in zip(logprobs, gradient, strict=True)
    ]
