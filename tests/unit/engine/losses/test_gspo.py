"""gspo against TRL's sequence-level importance sampling, and its token form against Tinker's formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.engine.losses.support import Padded, check, compute, make_padded


def sampled(weights: tuple[float, ...] = (1.0,)) -> Padded:
    padded = make_padded(arrays=("logprobs", "advantages"), weights=weights)
    # Near the sampler, so that some rows are within the narrow clip and some are not.
    noise = 1e-3 * (padded["logprobs"] - padded.logprobs.detach())
    padded.arrays["logprobs"] = padded.logprobs.detach() + noise
    padded.arrays["advantages"] = padded["advantages"][:, :1].expand_as(noise).contiguous()
    return padded


def clipped(coefficient: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    bounded = torch.clamp(coefficient, 1 - low, 1 + high)
    return -torch.min(coefficient * advantages, bounded * advantages)


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.2, 0.3)])
def test_equals_trl(low: float, high: float) -> None:
    padded = sampled()
    log_ratio = padded.logprobs - padded["logprobs"]
    weight = (log_ratio * padded.mask).sum(-1) / padded.mask.sum(-1).clamp(min=1.0)
    per_token = clipped(weight.exp().unsqueeze(-1), padded["advantages"], low, high)
    expected = ((per_token * padded.mask).sum(-1) / padded.mask.sum(-1)).mean()
    check("gspo", padded, expected, {"epsilon": low, "epsilon_high": high})


@pytest.mark.parametrize("masked", [False, True])
def test_the_token_form_equals_tinker(masked: bool) -> None:
    padded = sampled()
    mask = padded.mask != 0
    if masked:
        mask = mask & (torch.arange(mask.shape[1]) % 2 == 1)
        padded.arrays["sequence_ratio_mask"] = mask.double()
    rows = []
    for row in range(len(mask)):
        logprobs, sampler = padded.logprobs[row], padded["logprobs"][row]
        s = (logprobs.detach() - sampler)[mask[row]].mean()
        ratio = torch.exp(s + logprobs - logprobs.detach())
        rows.append((clipped(ratio, padded["advantages"][row], 0.1, 0.2) * padded.mask[row]).sum())
    options = {"loss_type": "gspo_token", "epsilon": 0.1, "epsilon_high": 0.2}
    check("gspo", padded, torch.stack(rows).sum(), options)


def test_both_forms_have_one_gradient_up_to_the_length() -> None:
    """As the paper shows: with one advantage per response the two forms learn the same."""
    padded, options = sampled(), {"epsilon": 0.5, "epsilon_high": 0.5}
    whole, _ = compute("gspo", padded, options)
    token, _ = compute("gspo", padded, {**options, "loss_type": "gspo_token"})
    first, second = (torch.autograd.grad(one, padded.logprobs)[0] for one in (whole, token))
    lengths = padded.mask.sum(-1, keepdim=True)
    assert torch.allclose(first * lengths * len(lengths), second, rtol=1e-10)
