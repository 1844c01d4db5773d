"""Losses as pure functions of the target tokens' log-probabilities and weights, and the table of them.

A loss returns a sum over tokens, in nats. Its `reduction` says what a gradient is divided by when the
optimizer takes a step: "mean", the total weight of everything accumulated; "sum", nothing. So
splitting a batch over several calls changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from schemas.errors import SignalError

Reduction = Literal["mean", "sum"]


def weighted_nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    """- sum_i weights[i] * logprobs[i], for `logprobs` [N] in nats and `weights` [N] -> scalar in nats."""
    return -(logprobs * weights).sum()


@dataclass(frozen=True)
class Loss:
    """A named loss: `function(logprobs [N], weights [N]) -> scalar sum`, and how it is reduced."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    reduction: Reduction


LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        # Mean negative log-likelihood: sum_i w[i] * -logp[i] / sum_i w[i], over the accumulation.
        Loss("causal_lm", weighted_nll, "mean"),
        # Weighted sum: sum_i w[i] * -logp[i]; weights may be negative, such as advantages.
        Loss("cross_entropy", weighted_nll, "sum"),
    )
}


def resolve_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """The loss `name`. Raises SignalError unknown_loss, or unknown_option: none takes options yet."""
    loss = LOSSES.get(name)
    if loss is None:
        raise SignalError(
            "unknown_loss",
            f"There is no loss {name!r}; there are {', '.join(LOSSES)}.",
            param="loss_fn",
        )
    for option in options:
        raise SignalError(
            "unknown_option", f"{name} takes no option {option!r}.", param=f"loss_kwargs.{option}"
        )
    return loss
