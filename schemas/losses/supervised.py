"""The supervised losses, and the one whose gradient the client computes."""

from __future__ import annotations

from schemas.losses.spec import SEQUENCES, LossSpec

LOSSES = (
    LossSpec(
        name="causal_lm",
        summary="Mean negative log-likelihood of the counted tokens.",
        formula="−Σ w·lp / Σ w",
        source="the usual next-token loss",
        divided_by="total weight",
        implementation="workers.engine.losses.causal_lm:LOSS",
        forms=SEQUENCES,
        signed_weights=True,
        wide=True,
    ),
    LossSpec(
        name="cross_entropy",
        summary="Weighted sum of negative log-likelihoods; weights of any sign.",
        formula="−Σ w·lp",
        source="Tinker, `cross_entropy`",
        divided_by="nothing",
        implementation="workers.engine.losses.cross_entropy:LOSS",
        forms=SEQUENCES,
        signed_weights=True,
        wide=True,
    ),
    LossSpec(
        name="custom",
        summary=(
            "Any differentiable loss C of the log-probabilities, computed by the client: `forward` gives lp, "
            "and the rows come back with weights w = ∂C/∂lp."
        ),
        formula="Σ w·lp, whose gradient is that of C",
        source="Tinker, `forward_backward_custom` (there as `cross_entropy` with weights −∂C/∂lp)",
        divided_by="nothing",
        implementation="workers.engine.losses.custom:LOSS",
        forms=("tokens",),
        signed_weights=True,
        empty_rows=True,
        wide=True,
    ),
)
