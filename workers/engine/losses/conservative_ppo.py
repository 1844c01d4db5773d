"""Policy optimization held near the sampler by a KL penalty in place of a clip."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.ratios import (
    k3,
    log_ratio,
    ratio_metrics,
    reward_metrics,
    where_advantage,
)


def conservative_ppo(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i w[i] * (-r[i] * A[i] + beta * (r[i] - 1 - log r[i])), divided by nothing.

    r = exp(lp - q); `lp` and `q` [N] in nats, `A` [N] in the reward's unit. The second term estimates
    KL(sampler || policy) at the tokens that the sampler drew. Source: Schulman et al. 2017 (1707.06347) eq.
    8, the conservative surrogate with a penalty, `beta` held fixed.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    gain = where_advantage(log_ratios, advantages).exp() * advantages
    loss = -gain + options["beta"] * k3(log_ratios)
    metrics = ratio_metrics(log_ratios) | reward_metrics(data)
    return LossOutput((loss * data.weights).sum(), metrics)


LOSS = Loss("conservative_ppo", conservative_ppo, reduction=lambda options: "sum")
