"""cispo against Tinker's formula, and its gradient against the closed form."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.losses.support import check, compute, make_padded


@pytest.mark.parametrize(("low", "high"), [(0.0, 4.0), (0.9, 1.1)])
def test_equals_tinker(low: float, high: float) -> None:
    padded = make_padded(arrays=("logprobs", "advantages"), weights=(1.0, 0.5))
    ratio = torch.exp(padded.logprobs.detach() - padded["logprobs"]).clip(low, high)
    expected = -(ratio * padded.logprobs * padded["advantages"] * padded.mask).sum()
    options = {"clip_low_threshold": low, "clip_high_threshold": high}
    check("cispo", padded, expected, options)
    (slope,) = torch.autograd.grad(compute("cispo", padded, options)[0], padded.logprobs)
    assert torch.allclose(slope, -ratio * padded["advantages"] * padded.mask, rtol=1e-12)
