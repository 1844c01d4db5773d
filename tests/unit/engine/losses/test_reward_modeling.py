"""reward_modeling against the formula as TRL's RewardTrainer writes it, on the implicit reward."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.unit.engine.losses.support import DTYPE, check, compute, make_pairs


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, [0.5, -1.0, 0.0]])
def test_equals_trl(center: float, margins: list[float] | None) -> None:
    pairs, beta = make_pairs(), 0.4
    rewards = beta * (pairs.sums(pairs.logprobs) - pairs.sums(pairs["ref_logprobs"]))
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = torch.tensor(margins or [0.0] * 3, dtype=DTYPE)
    if margins is not None:
        pairs.values["margin"] = margin.repeat_interleave(2)
    expected = -logsigmoid(chosen - rejected - margin).mean()
    expected = expected + center * torch.mean((chosen + rejected) ** 2)
    metrics = {
        "accuracy": (chosen > rejected).double().mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": rewards.mean(),
    }
    options = {"beta": beta, "center_rewards_coefficient": center}
    check("reward_modeling", pairs, expected, options, metrics)


def test_is_dpo_where_nothing_is_added() -> None:
    pairs = make_pairs(seed=2)
    found, _ = compute("reward_modeling", pairs, {"beta": 0.3})
    other, _ = compute("dpo", pairs, {"beta": 0.3})
    assert torch.allclose(found, other, rtol=1e-12)
