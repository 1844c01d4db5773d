"""importance_sampling against Tinker's formula on padded tensors."""

from __future__ import annotations

import torch

from tests.unit.engine.losses.support import check, compute, make_padded

ARRAYS = ("logprobs", "advantages")


def test_equals_tinker() -> None:
    padded = make_padded(arrays=ARRAYS, weights=(1.0, 0.5, -1.0))
    ratio = torch.exp(padded.logprobs - padded["logprobs"])
    expected = -(ratio * padded["advantages"] * padded.mask).sum()
    counted = padded.mask != 0
    kl = (ratio - 1 - ratio.log())[counted].mean()
    gap = (padded.logprobs - padded["logprobs"])[counted].abs().mean()
    metrics = {"ratio": ratio[counted].mean(), "approx_kl": kl, "logprob_gap": gap}
    check("importance_sampling", padded, expected, metrics=metrics)


def test_on_policy_it_is_reinforce() -> None:
    padded = make_padded(arrays=ARRAYS)
    padded.arrays["logprobs"] = padded.logprobs.detach()
    found, _ = compute("importance_sampling", padded, {})
    (slope,) = torch.autograd.grad(found, padded.logprobs)
    assert torch.allclose(slope, -padded["advantages"] * padded.mask, rtol=1e-12)
