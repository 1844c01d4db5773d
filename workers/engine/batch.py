"""Token rows to the tensors of one forward pass: end to end without padding, with the counted positions
listed.

Only positions with a target whose weight is not 0 get logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.counted import counted, example_of

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Batch:
    """Rows number `rows` of an operation, of `lengths`, in this order: `tokens` [T].

    Of the counted positions, once each and ascending: `index` [N] into T, and `targets` [N], or [N, K] where
    a row has several for a position; those of an unequal number are filled up with token 0. The entries
    that a loss counts, M in the order of `counted`, are `targets[places, columns]`: `places` [M] into N, and
    `columns` [M]; both None where they are just the N targets. `every`: `index` is all of T.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    index: Tensor
    targets: Tensor
    places: Tensor | None
    columns: Tensor | None
    every: bool

    def entries(self, logprobs: Tensor) -> Tensor:
        """Of what the model says of `targets`, the numbers of the counted entries [M]."""
        return logprobs if self.places is None else logprobs[self.places, self.columns]

    def spread(self, numbers: Tensor | None) -> Tensor | None:
        """Numbers of each position [N, ...], if there are any, at each of its entries [M, ...]."""
        if numbers is None or self.places is None:
            return numbers
        return numbers.index_select(0, self.places)


def check_rows(rows: Sequence[Row], *, vocab_size: int, context_length: int) -> None:
    """Raises SignalError with the example's field for what the model cannot take.

    The web tier has checked the same; an id outside the vocabulary would be fatal to a CUDA context.
    """
    if not rows:
        raise SignalError("validation_error", "The batch is empty.", param="batch_data")
    for number in range(len(rows)):
        _check_length(rows, number, context_length)
    ids = [np.frombuffer(row.tokens, np.int32) for row in rows]
    if not _within(np.concatenate(ids), vocab_size):
        number = next(at for at, own in enumerate(ids) if not _within(own, vocab_size))
        raise _out_of_range(rows, number, "tokens", vocab_size)
    entries = counted(rows)
    wrong = np.flatnonzero((entries.targets < 0) | (entries.targets >= vocab_size))
    if len(wrong):
        raise _out_of_range(rows, int(entries.rows[wrong[0]]), "targets", vocab_size)


def make_batch(rows: Sequence[Row], chosen: Sequence[int], device: torch.device) -> Batch:
    """The rows numbered `chosen` end to end, in this order, already checked."""
    parts = [rows[number] for number in chosen]
    tokens = np.concatenate([np.frombuffer(row.tokens, np.int32) for row in parts])
    lengths = tuple(len(row) for row in parts)
    entries = counted(parts)
    flat = (np.cumsum(lengths) - lengths)[entries.rows] + entries.positions
    width = max(row.width for row in parts)
    index, targets, places = flat, entries.targets, None
    if width > 1:
        index, places = np.unique(flat, return_inverse=True)
        targets = np.zeros((len(index), width), np.int64)
        targets[places, entries.columns] = entries.targets

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(device)

    return Batch(
        tuple(chosen),
        lengths,
        moved(tokens),
        moved(index),
        moved(targets),
        None if places is None else moved(places),
        None if places is None else moved(entries.columns),
        len(index) == len(tokens),
    )


def _check_length(rows: Sequence[Row], number: int, context_length: int) -> None:
    length = len(rows[number])
    if not length:
        raise SignalError(
            "validation_error",
            "The row has no tokens.",
            param=f"batch_data.{example_of(rows, number)}.tokens",
        )
    if length > context_length:
        raise SignalError(
            "sequence_too_long",
            f"A row has {length} tokens; the model's context is {context_length}.",
            param="batch_data",
        )


def _within(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _out_of_range(rows: Sequence[Row], number: int, name: str, vocab_size: int) -> SignalError:
    return SignalError(
        "token_out_of_range",
        f"Token ids are 0 to {vocab_size - 1}.",
        param=f"batch_data.{example_of(rows, number)}.{name}",
    )
