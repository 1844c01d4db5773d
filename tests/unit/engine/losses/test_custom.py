"""custom: with the gradient of any loss as weights, the gradient is that loss's."""

from __future__ import annotations

import torch

from tests.unit.engine.losses.support import Padded, compute, make_padded


def test_the_gradient_is_the_clients() -> None:
    padded = make_padded()
    kept = padded.mask > 0
    own = padded.logprobs.detach().clone().requires_grad_()
    loss = torch.logsumexp(own[kept] * 3, 0) + (own[kept].diff() ** 2).mean()
    (slope,) = torch.autograd.grad(loss, own)
    found, output = compute("custom", Padded(padded.logprobs, slope), {})
    (gradient,) = torch.autograd.grad(found, padded.logprobs)
    assert torch.allclose(gradient, slope, rtol=1e-12)
    assert output.metrics == {}
