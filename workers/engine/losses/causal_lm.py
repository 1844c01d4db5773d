"""Mean negative log-likelihood, the usual loss of supervised fine-tuning."""

from __future__ import annotations

from schemas.losses import Options
from workers.engine.losses.form import Loss, LossInput, LossOutput


def causal_lm(data: LossInput, options: Options) -> LossOutput:
    """L = sum_i -w[i] * lp[i], divided by sum_i w[i] over the accumulation.

    `lp` [N] in nats, `w` [N] without unit -> scalar in nats. Source: the next-token loss as transformers'
    `ForCausalLMLoss` has it, the mean taken over every token of the accumulation and not call by call.
    """
    return LossOutput(-(data.logprobs * data.weights).sum())


LOSS = Loss("causal_lm", causal_lm, reduction=lambda options: "mean")
