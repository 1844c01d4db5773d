"""conservative_ppo against equation 8 of the PPO paper, and its KL term against the exact divergence."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.losses.support import DTYPE, Padded, check, compute, make_padded


@pytest.mark.parametrize("beta", [0.0, 0.1, 3.0])
def test_equals_the_paper(beta: float) -> None:
    padded = make_padded(arrays=("logprobs", "advantages"), weights=(1.0, 0.5))
    ratio = torch.exp(padded.logprobs - padded["logprobs"])
    kl = ratio - 1 - torch.log(ratio)
    expected = (padded.mask * (beta * kl - ratio * padded["advantages"])).sum()
    check("conservative_ppo", padded, expected, {"beta": beta})


def test_the_penalty_is_the_kl_of_sampler_and_policy() -> None:
    """In expectation over the sampler, computed exactly over a vocabulary of 7."""
    generator = torch.Generator().manual_seed(1)
    policy, sampler = (
        torch.randn(7, generator=generator, dtype=DTYPE).log_softmax(0) for _ in "ab"
    )
    arrays = {"logprobs": sampler.view(1, -1), "advantages": torch.zeros(1, 7, dtype=DTYPE)}
    padded = Padded(policy.view(1, -1).requires_grad_(), sampler.exp().view(1, -1), arrays)
    found, _ = compute("conservative_ppo", padded, {"beta": 1.0})
    exact = (sampler.exp() * (sampler - policy)).sum()
    assert found.item() == pytest.approx(float(exact), rel=1e-12)
