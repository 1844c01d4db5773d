"""Clipped importance-sampled policy optimization: the ratio weighs, it is not differentiated."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.ratios import clip_metrics, log_ratio, ratio_metrics, reward_metrics


def cispo(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i -w[i] * sg(clip(r[i], low, high)) * A[i] * lp[i], divided by nothing.

    r = exp(lp - q); `lp` and `q` [N] in nats, `A` [N] in the reward's unit; sg stops the gradient, so that
    clipped tokens still learn, with a bounded weight. Source: MiniMax 2025 (2506.13585); sum and bounds
    as Tinker's `cispo`.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    low, high = options["clip_low_threshold"], options["clip_high_threshold"]
    ratio = log_ratios.detach().exp()
    loss = -(ratio.clamp(low, high) * advantages * data.logprobs * data.weights).sum()
    metrics = ratio_metrics(log_ratios) | clip_metrics(ratio, advantages, low, high)
    return LossOutput(loss, metrics | reward_metrics(data))


LOSS = Loss("cispo", cispo, reduction=lambda options: "sum")
