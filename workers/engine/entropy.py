"""Entropy of the next-token distribution without ever holding the logits of a whole batch.

As in `logprob`, the head is frozen, so the derivative by the hidden state is known in the forward pass:
with z the logits, p = softmax(z) and H = -sum p log p, dH/dz = -p (log p + H), and dz/dh is the head's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.engine import logprob
from workers.engine.decoder import Head


def token_entropy(hidden: Tensor, head: Head) -> Tensor:
    """H [N] in nats for `hidden` [N, D], differentiable in it."""
    entropy: Tensor = _TokenEntropy.apply(hidden, head)  # type: ignore[no-untyped-call]
    return entropy


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> Tensor:
        rows = max(1, logprob.CHUNK_ELEMENTS // head.weight.shape[0])
        parts = [_chunk(h, head, hidden.requires_grad) for h in torch.split(hidden, rows)]
        if hidden.requires_grad:
            ctx.save_for_backward(torch.cat([jacobian for _, jacobian in parts]))
        return torch.cat([entropy for entropy, _ in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (jacobian,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * jacobian).to(jacobian.dtype), None


def _chunk(hidden: Tensor, head: Head, differentiable: bool) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    # A probability of 0 has no part in the entropy, though its logarithm is minus infinity.
    entropy = -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)
    if not differentiable:
        return entropy, entropy
    slope = -p * (log_p.clamp(min=torch.finfo(log_p.dtype).min) + entropy.unsqueeze(1))
    if head.softcap is not None:
        slope *= 1 - (logits / head.softcap) ** 2
    jacobian = slope.to(hidden.dtype) @ head.weight
    return entropy, jacobian * head.scale if head.scale != 1.0 else jacobian
