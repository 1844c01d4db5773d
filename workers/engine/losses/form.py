"""The form of a loss: what it is given, what it returns, and what it asks for.

Shapes: N counted entries (a position with its target, weight not 0; with K targets per position one entry
for each), rows one after another; R rows. A loss sees any part of a batch that splits no unit of rows,
and sums of its parts are the whole: what must not depend on the split comes as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from schemas.losses import LossSpec, Options

# What a gradient is divided by when the optimizer takes a step: for each, the constant of a call that is
# added up over the accumulation. Calls of different reductions cannot share one.
Reduction = Literal["sum", "mean", "mean_of_rows", "mean_of_pairs", "mean_of_calls"]
DIVISORS: Mapping[Reduction, str] = {
    "mean": "weight",
    "mean_of_rows": "rows",
    "mean_of_pairs": "pairs",
    "mean_of_calls": "calls",
}


@dataclass(frozen=True)
class LossInput:
    """A part of a batch, as its loss sees it.

    `logprobs` [N] in nats, differentiable; `weights` [N]; `rows` [N], int64, the row of each entry, 0 to
    `row_count` - 1, ascending. `arrays` [N] are what the rows gave (`logprobs` of the sampler,
    `ref_logprobs`, `advantages`, …); so are `row_values` [R] (`chosen`, `label`, `reward`, …), and `example`,
    which the rows of one pair or group have in common. `constants` hold for the whole call: `weight`,
    `tokens`, `rows`, `pairs`, `calls`, and the loss's own statistics. `entropy` [N] in nats, differentiable,
    where the loss asks for it.
    """

    logprobs: Tensor
    weights: Tensor
    rows: Tensor
    row_count: int
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    entropy: Tensor | None = None

    def row_sums(self, values: Tensor) -> Tensor:
        """Sums over each row: [N] -> [R]."""
        return values.new_zeros(self.row_count).index_add(0, self.rows, values)

    def row_weights(self) -> Tensor:
        """The total weight of each row [R], at least as small as a divisor may be."""
        return self.row_sums(self.weights).clamp(min=torch.finfo(self.weights.dtype).tiny)

    def row_means(self, values: Tensor) -> Tensor:
        """Weighted means over each row: [N] -> [R]."""
        return self.row_sums(values * self.weights) / self.row_weights()


@dataclass(frozen=True)
class Mean:
    """A metric as a sum and what it is a sum over, so that parts of a batch add up; both scalars."""

    total: Tensor
    count: Tensor | float


Metrics = dict[str, Mean]


@dataclass(frozen=True)
class LossOutput:
    """`loss_sum`: a scalar in nats, not yet divided by anything; `metrics` without gradient."""

    loss_sum: Tensor
    metrics: Metrics = field(default_factory=dict)


def mean(values: Tensor) -> Mean:
    """The mean of all elements, as a metric."""
    return Mean(values.detach().sum(), float(values.numel()))


def merged(parts: Sequence[Metrics]) -> dict[str, tuple[float, float]]:
    """The metrics of a whole batch from those of its parts: each mean, and the count that it is over.

    What is a mean over nothing is left out.

    One transfer: on a GPU each .item() waits for all that is queued.
    """
    names = list(dict.fromkeys(name for part in parts for name in part))
    if not names:
        return {}
    pairs = [
        torch.stack([_pair(part[name]) for part in parts if name in part]).sum(0) for name in names
    ]
    numbers = zip(names, torch.stack(pairs).tolist(), strict=True)
    return {name: (total / count, count) for name, (total, count) in numbers if count}


def _pair(metric: Mean) -> Tensor:
    total = metric.total.double()
    return torch.stack((total, torch.as_tensor(metric.count, dtype=torch.float64).to(total.device)))


def _no(options: Options) -> bool:
    return False


@dataclass(frozen=True)
class Loss:
    """A loss: its name in `schemas.losses`, its function, and what it asks of the engine.

    `reduction` may depend on the options, as may `needs_reference` (`arrays["ref_logprobs"]`: what rows give,
    else those of the base with the adapter off) and `needs_entropy`. `paired`: the rows of one example
    are a unit that is never split, the chosen row before the rejected one.

    `statistics`, where there is one, is called once per call, before the first part, with the untrained rows
    of the batch (all rows, where there are none), without gradient; what it returns joins `constants`.
    """

    name: str
    function: Callable[[LossInput, Options], LossOutput]
    reduction: Callable[[Options], Reduction]
    needs_reference: Callable[[Options], bool] = _no
    needs_entropy: Callable[[Options], bool] = _no
    statistics: Callable[[LossInput, Options], Mapping[str, float]] | None = None
    paired: bool = False


@dataclass(frozen=True)
class BoundLoss:
    """A loss with its options, every one of them set, and what it takes."""

    loss: Loss
    options: Options
    spec: LossSpec

    @property
    def name(self) -> str:
        """As in the request."""
        return self.loss.name

    @property
    def reduction(self) -> Reduction:
        """What its sum is divided by."""
        return self.loss.reduction(self.options)

    @property
    def needs_reference(self) -> bool:
        """Whether it takes the reference's log-probabilities."""
        return self.loss.needs_reference(self.options)

    @property
    def needs_entropy(self) -> bool:
        """Whether it takes the entropy of each position."""
        return self.loss.needs_entropy(self.options)

    def __call__(self, part: LossInput) -> LossOutput:
        """The loss of a part of the batch."""
        return self.loss.function(part, self.options)
