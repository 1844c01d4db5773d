"""ppo against Tinker's formula, the textbook's cases one by one, and TRL's value loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.engine.losses.support import DTYPE, Padded, check, compute, make_padded

ARRAYS = ("logprobs", "advantages")


def surrogate(padded: Padded, low: float, high: float) -> Tensor:
    ratio = torch.exp(padded.logprobs - padded["logprobs"])
    advantages = padded["advantages"]
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.2, 0.2), (0.1, 0.5), (1.0, 3.0)])
def test_equals_tinker(low: float, high: float | None) -> None:
    padded = make_padded(arrays=ARRAYS, weights=(1.0, 0.5))
    upper = 1 + (low if high is None else high)
    expected = (surrogate(padded, 1 - low, upper) * padded.mask).sum()
    kept = padded.mask != 0
    ratio = torch.exp(padded.logprobs - padded["logprobs"])[kept]
    advantages = padded["advantages"][kept]
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > upper) & (advantages > 0)
    metrics = {
        "clip_ratio/low_mean": below.double().mean(),
        "clip_ratio/high_mean": above.double().mean(),
        "clip_ratio/region_mean": (below | above).double().mean(),
    }
    check("ppo", padded, expected, {"epsilon": low, "epsilon_high": high}, metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.1, 2.0, -2.2)],
)
def test_the_cases_of_the_clip(ratio: float, advantage: float, slope: float) -> None:
    """Clipped: no gradient. Else that of -r A, which is -r A again."""
    one = torch.full((1, 1), -1.0, dtype=DTYPE, requires_grad=True)
    sampled = -1.0 - torch.tensor(ratio, dtype=DTYPE).log()
    arrays = {
        "logprobs": sampled.view(1, 1),
        "advantages": torch.full_like(one, advantage).detach(),
    }
    found, _ = compute("ppo", Padded(one, torch.ones(1, 1, dtype=DTYPE), arrays), {})
    assert torch.autograd.grad(found, one)[0].item() == pytest.approx(slope)


def test_entropy_and_value_terms() -> None:
    padded = make_padded(arrays=(*ARRAYS, "values", "returns"), weights=(1.0, 2.0))
    padded.entropy = torch.rand_like(padded.logprobs).detach().requires_grad_()
    value_loss = 0.5 * (padded["values"] - padded["returns"]) ** 2
    whole = surrogate(padded, 0.8, 1.2) - 0.03 * padded.entropy + 0.1 * value_loss
    kept = padded.mask != 0
    metrics = {"entropy": padded.entropy[kept].mean(), "value_loss": value_loss[kept].mean()}
    options = {"entropy_coef": 0.03, "vf_coef": 0.1}
    check("ppo", padded, (whole * padded.mask).sum(), options, metrics)
