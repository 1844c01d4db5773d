"""Log-probabilities of target tokens without ever holding the logits of a whole batch.

The head is frozen, so the derivative of each log-probability by its hidden state is known in the forward
pass: J = (onehot(y) - softmax(z)) @ dz/dh. Keeping J [N, H] instead of logits [N, V] bounds the memory,
recomputes nothing, and is exact for any loss of the target log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.engine.decoder import Head

# Logits in one chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


def token_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """log p(targets[i] | hidden[i]) for `hidden` [N, H], `targets` [N] -> [N], in nats."""
    logprobs: Tensor = _TokenLogprob.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    return logprobs


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        parts = [
            _chunk(h, y, head, hidden.requires_grad)
            for h, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
        if hidden.requires_grad:
            ctx.save_for_backward(
                torch.cat([jacobian for _, jacobian in parts]) if len(parts) > 1 else parts[0][1]
            )
        return torch.cat([logprob for logprob, _ in parts]) if len(parts) > 1 else parts[0][0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * jacobian).to(jacobian.dtype), None, None


def _chunk(
    hidden: Tensor, targets: Tensor, head: Head, differentiable: bool
) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden)
    column = targets.unsqueeze(1)
    normalizer = logits.logsumexp(1, keepdim=True)
    logprob = (logits.gather(1, column) - normalizer).squeeze(1)
    if not differentiable:
        return logprob, logprob
    slope = logits.sub(normalizer).exp_().neg_()
    slope.scatter_add_(1, column, slope.new_ones(()).expand_as(column))
    if head.softcap is not None:
        slope *= 1 - (logits / head.softcap) ** 2
    jacobian = slope.to(hidden.dtype) @ head.weight
    return logprob, jacobian * head.scale if head.scale != 1.0 else jacobian
