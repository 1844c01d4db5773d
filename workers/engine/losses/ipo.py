"""Identity preference optimization."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput
from workers.engine.losses.pairs import pair_metrics, sides


def ipo(data: LossInput, options: Options) -> LossOutput:
    """L = sum over pairs of (D - 1 / (2 beta))^2, divided by the pairs.

    D = (lp_c - ref_c) / n_c - (lp_r - ref_r) / n_r in nats per token, n the response's tokens; `beta` is the
    paper's tau. Source: Azar et al. 2023 (2310.12036) eq. 17, per token as in TRL (which says that its
    authors use this form), so that beta means the same for short and long responses.
    """
    chosen, rejected = sides(data)
    beta = options["beta"]
    margin = chosen.log_ratios / chosen.tokens - rejected.log_ratios / rejected.tokens
    rewards = beta * chosen.log_ratios, beta * rejected.log_ratios
    loss = (margin - 1 / (2 * beta)) ** 2
    return LossOutput(loss.sum(), pair_metrics(chosen, rejected, *rewards))


LOSS = Loss(
    "ipo",
    ipo,
    reduction=lambda options: "mean_of_pairs",
    needs_reference=lambda options: True,
    paired=True,
)
