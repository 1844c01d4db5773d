"""causal_lm against torch's cross-entropy on logits."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from tests.unit.engine.losses.support import DTYPE, Padded, check, compute, make_padded


def test_equals_torch_on_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, 11, generator=generator, dtype=DTYPE, requires_grad=True)
    targets = torch.randint(11, (4, 6), generator=generator)
    mask = (torch.rand(4, 6, generator=generator) > 0.4).to(DTYPE)
    labels = targets.masked_fill(mask == 0, -100)
    expected = cross_entropy(logits.reshape(-1, 11), labels.reshape(-1), ignore_index=-100)
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    logprobs.retain_grad()
    found = Padded(logprobs, mask)
    check("causal_lm", found, -(logprobs * mask).sum() / mask.sum())
    loss, _ = compute("causal_lm", found, {})
    ours, theirs = (
        torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (loss, expected)
    )
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_weights_weigh() -> None:
    padded = make_padded(weights=(0.5, 2.0, -0.25))
    total = sum(
        -logprob * weight
        for row, weights in zip(padded.logprobs, padded.mask, strict=True)
        for logprob, weight in zip(row, weights, strict=True)
    )
    assert isinstance(total, torch.Tensor)
    check("causal_lm", padded, total / padded.mask.sum())
