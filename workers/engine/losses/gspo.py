"""Group sequence policy optimization: one ratio for a whole response."""

from __future__ import annotations

from torch import Tensor

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.ratios import (
    bounds,
    clip_metrics,
    clipped_surrogate,
    log_ratio,
    ratio_metrics,
    reward_metrics,
    where_advantage,
)


def gspo(data: LossInput, options: Options) -> LossOutput:
    """s = exp(mean over the row of lp - q); l[i] = -min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A).

    The mean is over the positions of `sequence_ratio_mask` that are not 0, or over the row by its weights.
    loss_type gspo: sum over rows of (sum_i w l / sum_i w), divided by the rows; s is differentiated.
    gspo_token: sum_i w l, divided by nothing, with sg(s) * exp(lp - sg(lp)) for s: equal in value, each
    token with the gradient of its own lp (sg stops a gradient). `lp` and `q` [N] in nats. Source: Zheng et
    al. 2025 (2507.18071) eq. 5, 13 and 14; gspo_token with its sum is Tinker's `gspo`.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    of_rows, own = _row_ratios(data, log_ratios)[data.rows], options["loss_type"] == "gspo_token"
    if own:
        of_rows = of_rows.detach() + data.logprobs - data.logprobs.detach()
    low, high = bounds(options)
    ratio = where_advantage(of_rows, advantages).exp()
    loss = -clipped_surrogate(ratio, advantages, low, high)
    total = (loss * data.weights).sum() if own else data.row_means(loss).sum()
    metrics = ratio_metrics(of_rows) | clip_metrics(ratio, advantages, low, high)
    return LossOutput(total, metrics | reward_metrics(data))


def _row_ratios(data: LossInput, log_ratios: Tensor) -> Tensor:
    """Mean log-ratio of each row [R], in nats per token."""
    mask = data.arrays.get("sequence_ratio_mask")
    if mask is None:
        return data.row_means(log_ratios)
    kept = (mask != 0).to(log_ratios.dtype)
    return data.row_sums(log_ratios * kept) / data.row_sums(kept).clamp(min=1)


LOSS = Loss(
    "gspo",
    gspo,
    reduction=lambda options: "sum" if options["loss_type"] == "gspo_token" else "mean_of_rows",
)
