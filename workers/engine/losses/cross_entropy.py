"""Weighted sum of negative log-likelihoods."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput


def cross_entropy(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i -w[i] * lp[i], divided by nothing; `w` may be of any sign, such as an advantage.

    `lp` [N] in nats, `w` [N] without unit -> scalar in nats. With K targets per position and their
    probabilities as weights it is distillation: the cross-entropy to a teacher's K likeliest tokens.
    Source: Tinker's `cross_entropy`.
    """
    return LossOutput(-(data.logprobs * data.weights).sum())


LOSS = Loss("cross_entropy", cross_entropy, reduction=lambda options: "sum")
