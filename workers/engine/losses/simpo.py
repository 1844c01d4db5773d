"""Simple preference optimization: no reference."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.pairs import pair_metrics, sides


def simpo(data: LossInput, options: Options) -> LossOutput:
    """L = sum over pairs of -log sigmoid(beta * (lp_c / n_c - lp_r / n_r) - gamma), divided by the pairs.

    lp / n in nats per token; `beta` per nat, `gamma` (simpo_gamma) without unit. Source: Meng et al. 2024
    (2405.14734) eq. 6.
    """
    chosen, rejected = sides(data)
    better, worse = options["beta"] * chosen.mean_logps, options["beta"] * rejected.mean_logps
    loss = -logsigmoid(better - worse - options["simpo_gamma"])
    return LossOutput(loss.sum(), pair_metrics(chosen, rejected, better, worse))


LOSS = Loss("simpo", simpo, reduction=lambda options: "mean_of_pairs", paired=True)
