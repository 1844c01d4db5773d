"""Forward and backward passes over rows, all of them padded into one batch.

What is here decides how rows become work for the device, and nothing else does: the trainer and the losses
know rows and log-probabilities alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.batch import Batch, make_batch
from workers.engine.entropy import token_entropy
from workers.engine.logprob import token_logprobs
from workers.engine.lora import Adapter
from workers.engine.objective import Objective
from workers.engine.scoring import top_logprobs

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Gradient:
    """Of one call: `loss_sum` in nats, its gradient [P] in the master's dtype with its L2 norm, `metrics`."""

    loss_sum: float
    gradient: Tensor
    norm: float
    metrics: dict[str, float]


def logprobs_of(base: Base, adapter: Adapter | None, rows: Sequence[Row]) -> Tensor:
    """Log-probabilities [N] in nats of the counted entries of `rows`, without gradient; None is the base."""
    batch = make_batch(rows, base.device)
    with base.activated(adapter), torch.no_grad():
        return token_logprobs(hidden_of(base, batch), batch.targets, base.decoder.head)


def top_logprobs_of(
    base: Base, adapter: Adapter | None, rows: Sequence[Row], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `logprobs_of`, and the `top_k` likeliest tokens of each entry: log-probabilities and ids [N, K]."""
    batch = make_batch(rows, base.device)
    with base.activated(adapter), torch.no_grad():
        return top_logprobs(hidden_of(base, batch), batch.targets, base.decoder.head, top_k)


def hidden_of(base: Base, batch: Batch, *, checkpoint: bool = False) -> Tensor:
    """Final hidden states [N, H] at the counted entries of `batch`."""
    hidden = base.decoder.hidden(batch.tokens, checkpoint=checkpoint)
    return hidden if batch.every else hidden.index_select(0, batch.index)


def gradient_of(
    base: Base, adapter: Adapter, objective: Objective, *, checkpoint: bool
) -> Gradient:
    """Everything of one call: reference and statistics where the loss asks for them, then the gradient.

    Raises SignalError non_finite, which names the example where one can be named.
    """
    if not objective.num_tokens:
        return Gradient(0.0, torch.zeros_like(adapter.master), 0.0, {})
    rows = objective.rows
    if objective.needs_reference:
        objective.set_reference(logprobs_of(base, None, rows))
    if objective.statistic_rows:
        chosen = [rows[index] for index in objective.statistic_rows]
        objective.set_statistics(logprobs_of(base, adapter, chosen))
    batch = make_batch([rows[index] for index in objective.trained], base.device)
    head = base.decoder.head
    with base.activated(adapter):
        hidden = hidden_of(base, batch, checkpoint=checkpoint)
        logprobs = token_logprobs(hidden, batch.targets, head)
        entropy = token_entropy(hidden, head) if objective.loss.needs_entropy else None
        output = objective.evaluate(objective.trained, logprobs, entropy)
        parts = torch.autograd.grad(
            output.loss_sum, adapter.leaves, allow_unused=True, materialize_grads=True
        )
    gradient = torch.cat([part.reshape(-1) for part in parts]).to(adapter.master.dtype)
    norm = torch.linalg.vector_norm(gradient)
    # One transfer: on a GPU each .item() waits for all that is queued.
    value, length = torch.stack((output.loss_sum.detach().to(norm.dtype), norm)).tolist()
    if not (math.isfinite(value) and math.isfinite(length)):
        raise _not_finite(value, objective, logprobs)
    return Gradient(value, gradient, length, objective.metrics([output.metrics]))


def _not_finite(value: float, objective: Objective, logprobs: Tensor) -> SignalError:
    row = objective.blame(objective.trained, logprobs)
    return SignalError(
        "non_finite",
        f"The loss ({value:g}) or its gradient is not finite; nothing was changed.",
        param="batch_data" if row is None else f"batch_data.{objective.example(row)}",
    )
