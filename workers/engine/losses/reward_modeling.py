"""Bradley-Terry reward modelling, the model's own log-ratio being the reward."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput, mean
from workers.engine.losses.pairs import share, sides


def reward_modeling(data: LossInput, options: Options) -> LossOutput:
    """L = sum over pairs of -log sigmoid(r_c - r_r - margin) + c * (r_c + r_r)^2, divided by the pairs.

    r = beta * (lp - ref), summed over the response's tokens: the reward that the model assigns
    implicitly, so that any saved adapter scores a response by two forward passes. `margin` is the pair's
    (0 where none is given), c is center_rewards_coefficient. Source: Bradley and Terry 1952 for the
    probability that one is preferred; Rafailov et al. 2023 (2305.18290) eq. 5 for r; margin and c as TRL's
    RewardTrainer has them.
    """
    chosen, rejected = sides(data)
    better, worse = options["beta"] * chosen.log_ratios, options["beta"] * rejected.log_ratios
    margin = data.row_values.get("margin")
    wanted = 0.0 if margin is None else margin[0::2]
    loss = -logsigmoid(better - worse - wanted)
    loss = loss + options["center_rewards_coefficient"] * (better + worse) ** 2
    metrics = {
        "accuracy": share(better > worse),
        "margin": mean(better - worse),
        "mean_reward": mean(torch.cat((better, worse))),
    }
    return LossOutput(loss.sum(), metrics)


LOSS = Loss(
    "reward_modeling",
    reward_modeling,
    reduction=lambda options: "mean_of_pairs",
    needs_reference=lambda options: True,
    paired=True,
)
