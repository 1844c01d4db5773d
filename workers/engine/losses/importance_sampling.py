"""Policy gradient on samples of another distribution."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.ratios import log_ratio, ratio_metrics, reward_metrics, where_advantage


def importance_sampling(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i -w[i] * r[i] * A[i], r = exp(lp - q), divided by nothing.

    `lp` and the sampler's `q` [N] in nats, `A` [N] in the reward's unit. Where policy and sampler agree the
    gradient is that of REINFORCE, -A * grad lp. Source: Tinker's `importance_sampling`.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    gain = where_advantage(log_ratios, advantages).exp() * advantages
    metrics = ratio_metrics(log_ratios) | reward_metrics(data)
    return LossOutput(-(gain * data.weights).sum(), metrics)


LOSS = Loss("importance_sampling", importance_sampling, reduction=lambda options: "sum")
