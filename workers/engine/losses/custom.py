"""Any differentiable loss of the log-probabilities, whose gradient the client has computed."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput


def custom(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i w[i] * lp[i] with w[i] = dC/dlp[i], so that dL/dlp is the gradient of the client's C.

    `lp` [N] in nats, `w` [N] in C's unit per nat, of any sign -> scalar; its value is a surrogate, C itself
    is the client's. `forward` gives the log-probabilities that C is computed from; it is exact as long as
    no optimizer step lies between the two passes. Source: the chain rule; Tinker's
    `forward_backward_custom` sends -dC/dlp to its `cross_entropy`, which is the same.
    """
    return LossOutput((data.logprobs * data.weights).sum())


LOSS = Loss("custom", custom, reduction=lambda options: "sum")
