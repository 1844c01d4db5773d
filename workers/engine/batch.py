"""Token rows to the tensors of one forward pass: end to end without padding, with the counted positions
listed.

Only positions whose weight is not 0 get logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Totals:
    """Of a whole operation: the sum of all weights, and the positions of a weight other than 0."""

    weight: float
    num_tokens: int


@dataclass(frozen=True)
class Batch:
    """Rows number `rows` of an operation, of `lengths`, in this order: `tokens` [T]; of the counted positions
    `index` [N] into T, `targets` [N], `weights` [N], and `owners` [N], each one's place in `rows`, ascending.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    owners: Tensor

    @property
    def num_tokens(self) -> int:
        """Positions that the loss counts, N."""
        return len(self.index)


def check_rows(rows: Sequence[Row], *, vocab_size: int, context_length: int) -> Totals:
    """What the rows add up to. Raises SignalError with the row's field for what the model cannot take.

    The web tier has checked the same; an id outside the vocabulary would be fatal to a CUDA context.
    """
    if not rows:
        raise SignalError("validation_error", "The batch is empty.", param="batch_data")
    total, count = 0.0, 0
    for number, row in enumerate(rows):
        tokens, targets, weights = _arrays(row)
        _check_length(len(tokens), number, context_length)
        counted = weights != 0
        total += float(weights.sum(dtype=np.float64))
        count += int(counted.sum())
        for name, ids in (("tokens", tokens), ("targets", targets[counted])):
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise SignalError(
                    "token_out_of_range",
                    f"Token ids are 0 to {vocab_size - 1}.",
                    param=f"batch_data.{number}.{name}",
                )
    if not count:
        raise SignalError(
            "no_target_tokens",
            "No position of the batch has a weight other than 0.",
            param="batch_data",
        )
    return Totals(total, count)


def _check_length(length: int, number: int, context_length: int) -> None:
    if not length:
        raise SignalError(
            "validation_error", "The row has no tokens.", param=f"batch_data.{number}.tokens"
        )
    if length > context_length:
        raise SignalError(
            "sequence_too_long",
            f"Row {number} has {length} tokens; the model's context is {context_length}.",
            param="batch_data",
        )


def make_batch(
    rows: Sequence[Row], chosen: Sequence[int], *, device: torch.device, dtype: torch.dtype
) -> Batch:
    """The rows numbered `chosen` end to end, in this order, already checked; weights become `dtype`."""
    parts = [_arrays(rows[number]) for number in chosen]
    tokens, targets, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    lengths = tuple(len(part[0]) for part in parts)
    index = np.flatnonzero(weights)
    owners = np.repeat(np.arange(len(lengths)), lengths)[index]

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return Batch(
        tuple(chosen),
        lengths,
        moved(tokens),
        moved(index),
        moved(targets[index]),
        torch.from_numpy(weights[index].astype(np.float64)).to(device, dtype),
        moved(owners),
    )


def _arrays(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.frombuffer(row.tokens, np.int32),
        np.frombuffer(row.targets, np.int32),
        np.frombuffer(memoryview(row.weights), np.float32),
    )
