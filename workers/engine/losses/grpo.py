"""Group-relative policy optimization, with the divisors of its variants."""

from __future__ import annotations

from torch import Tensor

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput, Reduction, mean
from workers.engine.losses.ratios import (
    bounds,
    clip_metrics,
    clipped_surrogate,
    k3,
    log_ratio,
    ratio_metrics,
    reward_metrics,
    where_advantage,
)


def grpo(data: LossInput, options: Options) -> LossOutput:
    """l[i] = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta * k3, summed as loss_type says.

    r = exp(lp - q) [N], at most `delta` in the first product where that is set; k3 = e^d - 1 - d of
    d = ref - lp in nats, times r with use_bias_correction_kl. By loss_type, with weights w:

    - grpo: sum over rows of (sum_i w l / sum_i w), divided by the rows;
    - dr_grpo: sum_i w l / max_completion_length, divided by the rows;
    - dapo: sum_i w l, divided by sum_i w of the accumulation;
    - bnpo: sum_i w l / sum_i w of the call, divided by the calls: the one that depends on how a batch is
      split over calls (not over micro-batches), by its definition.

    Source: Shao et al. 2024 (2402.03300) eq. 3 and 4; Liu et al. 2025 (2503.20783) for dr_grpo; Yu et al.
    2025 (2503.14476) eq. 10 to 12 for dapo and epsilon_high; INTELLECT-2 (2505.07291) for delta; bnpo and
    the correction of the KL term as in TRL's GRPOTrainer.
    """
    advantages, log_ratios = data.arrays["advantages"], log_ratio(data)
    low, high = bounds(options)
    ratio = where_advantage(log_ratios, advantages).exp()
    loss = -clipped_surrogate(ratio, advantages, low, high, options["delta"])
    metrics = ratio_metrics(log_ratios) | clip_metrics(ratio, advantages, low, high)
    if options["beta"]:
        divergence = _divergence(data, log_ratios, options)
        loss = loss + options["beta"] * divergence
        metrics["kl"] = mean(divergence)
    return LossOutput(_summed(data, loss, options), metrics | reward_metrics(data))


def _divergence(data: LossInput, log_ratios: Tensor, options: Options) -> Tensor:
    divergence = k3(data.arrays["ref_logprobs"] - data.logprobs)
    return divergence * log_ratios.exp() if options["use_bias_correction_kl"] else divergence


def _summed(data: LossInput, loss: Tensor, options: Options) -> Tensor:
    kind = options["loss_type"]
    if kind == "grpo":
        return data.row_means(loss).sum()
    total = (loss * data.weights).sum()
    divisors: dict[str, float] = {
        "dr_grpo": options["max_completion_length"] or 1,
        "bnpo": data.constants["weight"],
    }
    return total / divisors.get(kind, 1)


_REDUCTIONS: dict[str, Reduction] = {
    "grpo": "mean_of_rows",
    "dr_grpo": "mean_of_rows",
    "dapo": "mean",
    "bnpo": "mean_of_calls",
}

LOSS = Loss(
    "grpo",
    grpo,
    reduction=lambda options: _REDUCTIONS[options["loss_type"]],
    needs_reference=lambda options: bool(options["beta"]),
)
