"""Odds ratio preference optimization: supervised fine-tuning and preference in one loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput, mean
from workers.engine.losses.pairs import pair_metrics, sides


def orpo(data: LossInput, options: Options) -> LossOutput:
    """L = sum over pairs of -m_c - beta * log sigmoid(log odds_c - log odds_r), divided by the pairs.

    m = lp / n in nats per token, odds = e^m / (1 - e^m); `beta` is the paper's lambda. Source: Hong et al.
    2024 (2403.07691) eq. 6 and 7. TRL takes the likelihood term over the prompt too and over all tokens
    of a batch at once; here, as in the paper's expectation, it is each pair's own and of the response alone,
    so that it does not depend on how a batch is split.
    """
    chosen, rejected = sides(data)
    better, worse = chosen.mean_logps, rejected.mean_logps
    log_odds = _log_odds(better) - _log_odds(worse)
    ratio = logsigmoid(log_odds)
    beta = options["beta"]
    metrics = pair_metrics(chosen, rejected, beta * better, beta * worse)
    metrics |= {
        "nll_loss": mean(-better),
        "log_odds_ratio": mean(ratio),
        "log_odds_chosen": mean(log_odds),
    }
    return LossOutput((-better - beta * ratio).sum(), metrics)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """m - log(1 - e^m) for m < 0, accurate at both ends (Mächler 2012, "log(1 - exp(-|a|))")."""
    near = mean_logps > -math.log(2)
    # Each branch sees only what it is accurate for: the other's infinity would reach the gradient.
    small = torch.where(near, mean_logps, -1.0)
    large = torch.where(near, -1.0, mean_logps)
    complement = torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-large.exp()))
    return mean_logps - complement


LOSS = Loss("orpo", orpo, reduction=lambda options: "mean_of_pairs", paired=True)
