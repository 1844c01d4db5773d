"""grpo and its variants against the formula as TRL's trainer writes it on padded tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.engine.losses.support import Padded, check, compute, constants, make_padded

LENGTH = 16


def trl(padded: Padded, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """GRPOTrainer._compute_loss of TRL 1.16, for one accumulation of one batch; and its per-token KL."""
    mask, logps = padded.mask, padded.logprobs
    old = padded.arrays.get("logprobs", logps.detach())
    coef_1 = torch.exp(logps - old)
    kl = None
    if options.get("beta"):
        delta = padded["ref_logprobs"] - logps
        kl = torch.exp(delta) - delta - 1
        if options.get("use_bias_correction_kl"):
            kl = kl * coef_1
    low = options.get("epsilon", 0.2)
    high = options.get("epsilon_high", low)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    if options.get("delta") is not None:
        coef_1 = torch.clamp(coef_1, max=options["delta"])
    advantages = padded["advantages"]
    per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if kl is not None:
        per_token = per_token + options["beta"] * kl
    kind = options.get("loss_type", "dapo")
    if kind == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1)).mean(), kl
    total = (per_token * mask).sum()
    return total / (len(mask) * LENGTH if kind == "dr_grpo" else mask.sum()), kl


def sampled(seed: int = 0, weights: tuple[float, ...] = (1.0,)) -> Padded:
    """The advantage of a row is one for all its tokens, as a group's is."""
    padded = make_padded(
        seed=seed, arrays=("logprobs", "ref_logprobs", "advantages"), weights=weights
    )
    padded.arrays["advantages"] = padded["advantages"][:, :1].expand_as(padded.mask).contiguous()
    return padded


def full(options: dict[str, Any]) -> dict[str, Any]:
    length = {"max_completion_length": LENGTH} if options.get("loss_type") == "dr_grpo" else {}
    return {**options, **length}


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"delta": 1.3},
        {"beta": 0.04},
        {"beta": 0.5, "use_bias_correction_kl": True},
    ],
    ids=str,
)
def test_equals_trl(kind: str, options: dict[str, Any]) -> None:
    padded, given = sampled(), {**options, "loss_type": kind}
    expected, kl = trl(padded, given)
    metrics = {} if kl is None else {"kl": kl[padded.mask != 0].mean()}
    check("grpo", padded, expected, full(given), metrics)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_weights_are_a_mask_of_any_height(kind: str) -> None:
    padded = sampled(weights=(1.0, 0.25))
    expected, _ = trl(padded, {"loss_type": kind})
    check("grpo", padded, expected, full({"loss_type": kind}))


def test_without_the_samplers_logprobs_it_is_on_policy() -> None:
    padded = sampled()
    del padded.arrays["logprobs"]
    expected, _ = trl(padded, {})
    check("grpo", padded, expected, {}, {"ratio": 1.0, "approx_kl": 0.0})
    found, _ = compute("grpo", padded, {"loss_type": "grpo"})
    (slope,) = torch.autograd.grad(found, padded.logprobs)
    shares = padded.mask / padded.mask.sum(-1, keepdim=True) / len(padded.mask)
    assert torch.allclose(slope, -padded["advantages"] * shares, rtol=1e-12)


def test_bnpo_divides_each_call_by_its_own_tokens() -> None:
    first, second = sampled(1), sampled(2)
    losses = [trl(one, {"loss_type": "bnpo"})[0] for one in (first, second)]
    found = [compute("grpo", one, {"loss_type": "bnpo"})[0] for one in (first, second)]
    assert torch.allclose(torch.stack(found).mean(), torch.stack(losses).mean(), rtol=1e-12)
    half = first.rows([0, 1, 2])
    part, _ = compute("grpo", half, {"loss_type": "bnpo"}, constants(first))
    rest, _ = compute("grpo", first.rows([3, 4, 5]), {"loss_type": "bnpo"}, constants(first))
    assert torch.allclose(part + rest, losses[0], rtol=1e-12)


def test_rewards_are_reported() -> None:
    padded = sampled()
    rewards = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.5, 0.5], dtype=padded.mask.dtype)
    padded.values = {"reward": rewards, "zero_std": (rewards == 0.5).double()}
    expected, _ = trl(padded, {})
    check("grpo", padded, expected, {}, {"reward": 0.75, "frac_reward_zero_std": 0.5})
