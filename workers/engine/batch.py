"""Token rows to the tensors of one forward pass: padded on the right, with the counted entries listed.

Only positions whose weight is not 0 get logits. Padding is token 0 at the end of a row: attention is
causal, so nothing real sees it, and it has no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.counted import counted

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Batch:
    """`tokens` [B, T]; for each counted entry its place in the flattened B * T, `index` [N], and its target,
    `targets` [N]. `every`: the entries are all positions, once each and in order."""

    tokens: Tensor
    index: Tensor
    targets: Tensor
    every: bool


def make_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad `rows`, which `check_rows` has accepted, into one batch."""
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = np.frombuffer(row.tokens, np.int32)
    entries = counted(rows)
    index = entries.rows * longest + entries.positions
    return Batch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(index).to(device),
        torch.from_numpy(entries.targets).to(device),
        np.array_equal(index, np.arange(tokens.size)),
    )


def check_rows(rows: Sequence[Row], *, vocab_size: int, context_length: int) -> None:
    """Raises SignalError with the row's field for what the model cannot take.

    The web tier has checked the same; an id outside the vocabulary would be fatal to a CUDA context.
    """
    if not rows:
        raise SignalError("validation_error", "The batch is empty.", param="batch_data")
    longest = max(len(row.tokens) for row in rows)
    if longest > context_length:
        raise SignalError(
            "sequence_too_long",
            f"A row has {longest} tokens; the model's context is {context_length}.",
            param="batch_data",
        )
    ids = [np.frombuffer(row.tokens, np.int32) for row in rows]
    if not _within(np.concatenate(ids), vocab_size):
        number = next(at for at, own in enumerate(ids) if not _within(own, vocab_size))
        raise _out_of_range(number, rows[number], "tokens", vocab_size)
    entries = counted(rows)
    wrong = np.flatnonzero((entries.targets < 0) | (entries.targets >= vocab_size))
    if len(wrong):
        number = int(entries.rows[wrong[0]])
        raise _out_of_range(number, rows[number], "targets", vocab_size)


def _within(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _out_of_range(number: int, row: Row, name: str, vocab_size: int) -> SignalError:
    return SignalError(
        "token_out_of_range",
        f"Token ids are 0 to {vocab_size - 1}.",
        param=f"batch_data.{row.example if row.example >= 0 else number}.{name}",
    )
