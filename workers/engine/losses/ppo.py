"""Proximal policy optimization with a clipped ratio."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput, mean
from workers.engine.losses.ratios import (
    bounds,
    clip_metrics,
    clipped_surrogate,
    log_ratio,
    ratio_metrics,
    reward_metrics,
    where_advantage,
)


def ppo(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i w[i] * (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) - c_H H + c_V (V - R)^2 / 2).

    r = exp(lp - q) [N]; `A`, values `V` and returns `R` [N] in the reward's unit, entropy `H` [N] in nats;
    c_H is entropy_coef, c_V vf_coef. Divided by nothing. The values are the client's numbers, so that
    their term has no gradient in this model: it makes the reported loss whole. Source: Schulman et al. 2017
    (1707.06347) eq. 7 and 9; sum and bounds as Tinker's `ppo`.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    low, high = bounds(options)
    ratio = where_advantage(log_ratios, advantages).exp()
    loss = -clipped_surrogate(ratio, advantages, low, high)
    metrics = ratio_metrics(log_ratios) | clip_metrics(ratio, advantages, low, high)
    if data.entropy is not None and options["entropy_coef"]:
        loss = loss - options["entropy_coef"] * data.entropy
        metrics["entropy"] = mean(data.entropy)
    if "values" in data.arrays:
        value_loss = (data.arrays["values"] - data.arrays["returns"]) ** 2 / 2
        loss = loss + options["vf_coef"] * value_loss
        metrics["value_loss"] = mean(value_loss)
    return LossOutput((loss * data.weights).sum(), metrics | reward_metrics(data))


LOSS = Loss(
    "ppo",
    ppo,
    reduction=lambda options: "sum",
    needs_entropy=lambda options: bool(options["entropy_coef"]),
)
