"""Direct reward optimization."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.ratios import log_ratio, ratio_metrics, reward_metrics


def dro(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i -w[i] * (A[i] * lp[i] - beta / 2 * (lp[i] - q[i])^2), divided by nothing.

    `lp` and `q` [N] in nats, `A` [N] in the reward's unit, `beta` in that unit per nat: no ratio that could
    grow without bound, so it takes data of any age. Source: Richemond et al. 2024 (2405.19107); the form
    per token is Tinker's `dro`.
    """
    log_ratios = log_ratio(data)
    gain = data.arrays["advantages"] * data.logprobs - options["beta"] / 2 * log_ratios**2
    metrics = ratio_metrics(log_ratios) | reward_metrics(data)
    return LossOutput(-(gain * data.weights).sum(), metrics)


LOSS = Loss("dro", dro, reduction=lambda options: "sum")
