"""Token rows to the tensors of one forward pass: padded on the right, with the counted positions listed.

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

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Batch:
    """`tokens` [B, T]; `index` [N] into the flattened B * T of the counted positions, with their `targets`
    [N] and `weights` [N] in row order."""

    tokens: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    total_weight: float

    @property
    def num_tokens(self) -> int:
        """Positions that the loss counts, N."""
        return len(self.index)


def make_batch(
    rows: Sequence[Row],
    *,
    vocab_size: int,
    context_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """Pad `rows` into one batch. Raises SignalError with the row's field for what the model cannot take.

    The web tier has checked the same; an id outside the vocabulary would be fatal to a CUDA context.
    """
    if not rows:
        raise SignalError("validation_error", "The batch is empty.", param="batch_data")
    longest = max(len(row.tokens) for row in rows)
    shape = (len(rows), longest)
    tokens = np.zeros(shape, np.int64)
    targets = np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float64)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        tokens[number, :length] = np.frombuffer(row.tokens, np.int32)
        targets[number, :length] = np.frombuffer(row.targets, np.int32)
        weights[number, :length] = np.frombuffer(memoryview(row.weights), np.float32)
    index = np.flatnonzero(weights)
    counted, weight = targets.reshape(-1)[index], weights.reshape(-1)[index]
    _check(tokens, counted, index, longest, vocab_size, context_length)
    return Batch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(index).to(device),
        torch.from_numpy(counted).to(device),
        torch.from_numpy(weight).to(device, dtype),
        float(weight.sum()),
    )


def _check(
    tokens: np.ndarray,
    targets: np.ndarray,
    index: np.ndarray,
    longest: int,
    vocab_size: int,
    context_length: int,
) -> None:
    if longest > context_length:
        raise SignalError(
            "sequence_too_long",
            f"A row has {longest} tokens; the model's context is {context_length}.",
            param="batch_data",
        )
    if not index.size:
        raise SignalError(
            "no_target_tokens",
            "No position of the batch has a weight other than 0.",
            param="batch_data",
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        row = int(np.flatnonzero(((tokens < 0) | (tokens >= vocab_size)).any(axis=1))[0])
        raise _out_of_range(row, "tokens", vocab_size)
    if targets.min() < 0 or targets.max() >= vocab_size:
        row = int(index[(targets < 0) | (targets >= vocab_size)][0]) // longest
        raise _out_of_range(row, "targets", vocab_size)


def _out_of_range(row: int, name: str, vocab_size: int) -> SignalError:
    return SignalError(
        "token_out_of_range",
        f"Token ids are 0 to {vocab_size - 1}.",
        param=f"batch_data.{row}.{name}",
    )
