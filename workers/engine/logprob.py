"""Log-probabilities of target tokens without ever holding the logits of a whole batch.

Two ways, both exact for any loss of what they return, both in chunks of positions:

- kept: the head is frozen, so the derivative of each log-probability by its hidden state is known in the
  forward pass: J = (onehot(y) - softmax(z)) @ dz/dh. Keeping J [N, H] instead of logits [N, V] bounds the
  memory and recomputes nothing;
- recomputed: where several targets of a position, its entropy, or an adapter of the head itself are
  differentiated, the logits of a chunk are made again in the backward pass. With p = softmax(z), S the
  entropy and g the slopes, dz = sum_k g_k onehot(y_k) - (sum_k g_k) p - g_S p (log p + S).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.decoder import Head

# Logits in one chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TokenStats:
    """Of N positions: `logprobs` [N] or [N, K] of the targets in nats; where asked for `entropy` [N] in
    nats, and the likeliest tokens `top_ids` [N, k] with their `top_logprobs` [N, k], which have no
    derivative; `rest` [M] are log-probabilities of other entries, which have none either."""

    logprobs: Tensor
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    rest: Tensor | None = None


def token_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """log p(targets[i] | hidden[i]) for `hidden` [N, H], `targets` [N] or [N, K] -> the same shape, in
    nats."""
    if targets.dim() == 1 and not head.trained:
        kept: Tensor = _Kept.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
        return kept
    return token_stats(hidden, targets, head).logprobs


def token_stats(
    hidden: Tensor, targets: Tensor, head: Head, *, entropy: bool = False, top: int = 0
) -> TokenStats:
    """The log-probabilities of `targets` [N] or [N, K], and what else is asked for."""
    if not entropy and not top and targets.dim() == 1 and not head.trained:
        return TokenStats(token_logprobs(hidden, targets, head))
    columns = targets.unsqueeze(1) if targets.dim() == 1 else targets
    made = _Recomputed.apply(hidden, columns, head, entropy, top, *head.leaves)  # type: ignore[no-untyped-call]
    logprobs = made[0].squeeze(1) if targets.dim() == 1 else made[0]
    ids, values = (made[2], made[3]) if top else (None, None)
    return TokenStats(logprobs, made[1] if entropy else None, ids, values)


def _rows(head: Head) -> int:
    """Positions in one chunk."""
    return max(1, CHUNK_ELEMENTS // head.weight.shape[0])


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        rows = _rows(head)
        chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        parts = [_chunk(h, y, head, hidden.requires_grad) for h, y in chunks]
        if hidden.requires_grad:
            ctx.save_for_backward(_cat([jacobian for _, jacobian in parts]))
        return _cat([logprob for logprob, _ in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (jacobian,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * jacobian).to(jacobian.dtype), None, None


def _chunk(
    hidden: Tensor, targets: Tensor, head: Head, differentiable: bool
) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden)
    column = targets.unsqueeze(1)
    chosen, most = logits.gather(1, column), logits.amax(1, keepdim=True)
    bend = None if head.softcap is None else 1 - (logits / head.softcap) ** 2
    # One exponential per logit: what is summed is also the numerator of the softmax.
    shares = logits.sub_(most).exp_()
    total = shares.sum(1, keepdim=True)
    logprob = (chosen - most - total.log()).squeeze(1)
    if not differentiable:
        return logprob, logprob
    # total * (softmax - onehot): divided by -total behind the product, which is smaller.
    shares.scatter_add_(1, column, total.neg())
    if bend is not None:
        shares *= bend
    product = shares.to(hidden.dtype) @ head.weight
    return logprob, (product * (-head.scale / total)).to(hidden.dtype)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        entropy: bool,
        top: int,
        *_leaves: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, most = _rows(head), min(top, head.weight.shape[0])
        logprobs, entropies, ids, values = [], [], [], []
        for h, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            found = head.logits(h).log_softmax(1)
            logprobs.append(found.gather(1, y))
            entropies.append(_entropy(found) if entropy else found.new_zeros(len(y)))
            likeliest = found.topk(most, dim=1)
            ids.append(likeliest.indices)
            values.append(likeliest.values)
        ctx.save_for_backward(hidden, targets)
        ctx.head, ctx.entropy = head, entropy
        made = _cat(logprobs), _cat(entropies), _cat(ids), _cat(values)
        ctx.mark_non_differentiable(*made[2:])
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        rows, by_hidden, by_leaves = _rows(ctx.head), [], None
        split = (torch.split(part, rows) for part in (hidden, targets, *gradients[:2]))
        for h, y, slopes, by_entropy in zip(*split, strict=True):
            by_logits = _by_logits(ctx.head, h, y, slopes, by_entropy if ctx.entropy else None)
            by_h, leaves = ctx.head.backward(by_logits, h)
            by_hidden.append(by_h)
            if by_leaves is None:
                by_leaves = leaves
            else:
                by_leaves = [old.add_(new) for old, new in zip(by_leaves, leaves, strict=True)]
        return _cat(by_hidden), None, None, None, None, *(by_leaves or [])


def _by_logits(
    head: Head, hidden: Tensor, targets: Tensor, slopes: Tensor, by_entropy: Tensor | None
) -> Tensor:
    """The derivative [n, V] by what the head's product gives, before scale and cap."""
    logits = head.logits(hidden)
    logprobs = logits.log_softmax(1)
    shares = logprobs.exp()
    by_logits = shares * slopes.sum(1, keepdim=True).neg()
    by_logits.scatter_add_(1, targets, slopes.to(by_logits.dtype))
    if by_entropy is not None:
        level = logprobs + _entropy(logprobs).unsqueeze(1)
        by_logits -= shares * level * by_entropy.unsqueeze(1)
    if head.softcap is not None:
        by_logits *= 1 - (logits / head.softcap) ** 2
    return by_logits.mul_(head.scale)


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(1)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
