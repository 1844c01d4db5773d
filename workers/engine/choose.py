"""From logits to the next token: temperature, top_k, top_p, and one uniform number per row.

Pure functions. Truncation is top_k first, then top_p of what is left, as transformers and vLLM do it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Nucleus sampling sorts this many of the likeliest tokens first, and more only where they do not suffice.
_FIRST_CANDIDATES = 256


def choose(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Token ids [R] and their log-probabilities [R] for `logits` [R, V] and `uniforms` [R] in (0, 1).

    The log-probabilities are those of softmax(logits / temperature) before truncation; at temperature 0
    the likeliest token is taken and the log-probabilities are those of softmax(logits).
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        logprobs = logits.log_softmax(-1)
    else:
        # Relative to the maximum, so that a tiny temperature cannot overflow.
        logprobs = ((logits - logits.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
        ids = _draw(logprobs, uniforms, top_k, top_p)
    return ids, logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _draw(logprobs: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    vocabulary = logprobs.shape[-1]
    limit = min(top_k, vocabulary) if top_k > 0 else vocabulary
    if limit == vocabulary and top_p >= 1.0:
        return _inverse_cdf(logprobs.double().exp(), uniforms)
    if top_p >= 1.0:
        values, order = logprobs.topk(limit)
        return order.gather(
            -1, _inverse_cdf(values.double().exp(), uniforms).unsqueeze(-1)
        ).squeeze(-1)
    probabilities, order, needed = _nucleus(logprobs, limit, top_p)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < needed, probabilities, 0.0)
    return order.gather(-1, _inverse_cdf(kept, uniforms).unsqueeze(-1)).squeeze(-1)


def _nucleus(logprobs: Tensor, limit: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Descending probabilities, their tokens, and the mass [R, 1] that must be covered."""
    count = limit if limit < logprobs.shape[-1] else min(_FIRST_CANDIDATES, limit)
    while True:
        values, order = logprobs.topk(count)
        probabilities = values.double().exp()
        total = probabilities.sum(-1, keepdim=True)
        if count == limit:
            return probabilities, order, top_p * total
        if bool((total >= top_p).all()):
            return probabilities, order, torch.full_like(total, top_p)
        count = min(8 * count, limit)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place [R] where the running sum of `weights` [R, K] exceeds uniforms * total."""
    running = weights.cumsum(-1)
    wanted = uniforms.unsqueeze(-1) * running[:, -1:]
    return (
        torch.searchsorted(running, wanted, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)
    )
