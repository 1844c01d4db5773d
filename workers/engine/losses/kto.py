"""Kahneman-Tversky optimization: single responses, each labelled desirable or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput, Mean, Metrics
from workers.engine.losses.pairs import reference_sums


def kto(data: LossInput, options: Options) -> LossOutput:
    """L = sum over rows of lambda * (1 - sigmoid(beta * (h - z))), divided by the rows.

    h = lp - ref in nats, summed over the response; for an undesirable row the sign inside the sigmoid
    turns. lambda is desirable_weight or undesirable_weight; z is `statistics`' `kl`. Source: Ethayarajh et
    al. 2024 (2402.01306) eq. 7.
    """
    log_ratios, logps = _log_ratios(data), data.row_sums(data.logprobs * data.weights)
    desirable = data.row_values["label"] > 0
    sign = torch.where(desirable, 1.0, -1.0).to(logps.dtype)
    weight = torch.where(desirable, options["desirable_weight"], options["undesirable_weight"])
    kl = data.constants["kl"]
    value = torch.sigmoid(options["beta"] * sign * (log_ratios - kl))
    metrics = _metrics(options["beta"] * log_ratios, logps, desirable)
    metrics["kl"] = Mean(logps.new_tensor(kl * data.row_count), float(data.row_count))
    return LossOutput((weight.to(logps.dtype) * (1 - value)).sum(), metrics)


def kl_baseline(data: LossInput, options: Options) -> Mapping[str, float]:
    """`kl`: max(0, mean over rows of lp - ref), of prompts with the response of another row.

    An estimate, in nats, of how far the policy has moved from the reference; no gradient flows through
    it. Source: 2402.01306 section 4.1; the mismatched pairs are TRL's, each row with the response of the
    row before it.
    """
    return {"kl": max(0.0, _log_ratios(data).mean().item())}


def _log_ratios(data: LossInput) -> Tensor:
    reference = reference_sums(data)
    assert reference is not None, "kto asks for the reference"
    return data.row_sums(data.logprobs * data.weights) - reference


def _metrics(rewards: Tensor, logps: Tensor, desirable: Tensor) -> Metrics:
    metrics = {}
    for name, which in (("chosen", desirable), ("rejected", ~desirable)):
        kept = which.to(logps.dtype)
        for prefix, values in (("rewards", rewards), ("logps", logps)):
            metrics[f"{prefix}/{name}"] = Mean((values.detach() * kept).sum(), kept.sum())
    return metrics


LOSS = Loss(
    "kto",
    kto,
    reduction=lambda options: "mean_of_rows",
    needs_reference=lambda options: True,
    statistics=kl_baseline,
)
