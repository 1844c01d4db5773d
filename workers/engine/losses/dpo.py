"""Direct preference optimization."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.pairs import pair_metrics, sides


def dpo(data: LossInput, options: Options) -> LossOutput:
    """L = sum over pairs of -(1 - s) log sigmoid(beta * D) - s log sigmoid(-beta * D), divided by the pairs.

    D = (lp_c - ref_c) - (lp_r - ref_r) in nats, each a sum over the response's tokens; `s` is
    label_smoothing, `beta` per nat. Source: Rafailov et al. 2023 (2305.18290) eq. 7; the smoothing is
    Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    chosen, rejected = sides(data)
    beta, smoothing = options["beta"], options["label_smoothing"]
    better, worse = beta * chosen.log_ratios, beta * rejected.log_ratios
    margin = better - worse
    loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return LossOutput(loss.sum(), pair_metrics(chosen, rejected, better, worse))


LOSS = Loss(
    "dpo",
    dpo,
    reduction=lambda options: "mean_of_pairs",
    needs_reference=lambda options: True,
    paired=True,
)
