"""The gradient of one call: what its loss asks for beforehand, then micro-batch after micro-batch.

Every pass of the call is by a plan, and all of them are in the call's: the reference's log-probabilities and
those of a statistic round by theirs as the gradient does by its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.counted import of_every_entry
from workers.engine.memory import Budget
from workers.engine.objective import Objective
from workers.engine.parameters import Parameters
from workers.engine.passes import Asked, Passes, Sums
from workers.engine.plan import Plan, Unit

if TYPE_CHECKING:
    from workers.text.rows import Row


@dataclass(frozen=True)
class Gradient:
    """Of one call: `loss_sum` in nats, its gradient [P] in the master's dtype with its L2 norm, `metrics` as
    means and the counts that they are over, the `plan` that repeats it, as JSON, and
    `scores` [E], where asked for, the log-probability of every entry of every row."""

    loss_sum: float
    gradient: Tensor
    norm: float
    metrics: dict[str, tuple[float, float]]
    plan: dict[str, Any]
    scores: Tensor | None = None


@dataclass(frozen=True)
class Value:
    """A loss without its gradient: `loss_sum` in nats, `metrics` as of `Gradient`, and `scores` [E], the
    log-probability of every entry of every row in nats."""

    loss_sum: float
    metrics: dict[str, tuple[float, float]]
    scores: Tensor


class Call:
    """One forward_backward of a run: its objective, and how it is computed."""

    def __init__(
        self,
        base: Base,
        adapter: Parameters,
        objective: Objective,
        *,
        checkpoint: bool = False,
        stream: int = 0,
        plan: Any = None,
        budget: Budget | None = None,
        scores: bool = False,
    ) -> None:
        """`stream` keys the dropout; `plan` is that of an earlier execution, None to make one by `budget`;
        `scores` asks for the log-probabilities of every entry."""
        self._scores = scores
        self._budget = budget or base.new_budget()
        self.base, self.adapter, self.objective = base, adapter, objective
        self.checkpoint, self.stream, self._recorded = checkpoint, stream, plan
        self._plan: dict[str, Any] = {}

    def gradient(self) -> Gradient:
        """Raises SignalError non_finite, which names the example where one can be named, out_of_memory, and
        state_mismatch for a plan that is not this call's."""
        objective = self.objective
        self._prepare()
        asked = Asked(entropy=objective.loss.needs_entropy, everything=self._scores)
        passes = self._passes(self.adapter, objective.rows, asked)
        units = objective.units
        recorded = self._recorded
        plan = passes.plan(units) if recorded is None else Plan.from_json(recorded, units)
        sums = passes.gradient(plan, objective.evaluate)
        if not (math.isfinite(sums.loss) and math.isfinite(sums.norm)):
            raise self._not_finite(passes, sums)
        metrics = objective.metrics(sums.metrics)
        made = {**sums.plan.to_json(), **self._plan}
        return Gradient(sums.loss, sums.gradient, sums.norm, metrics, made, sums.scores)

    def value(self) -> Value:
        """The loss without a gradient, and the log-probabilities of every entry of every row.

        Raises SignalError non_finite, which names the example where one can be named, and out_of_memory.
        """
        objective = self.objective
        self._prepare()
        rows = of_every_entry(objective.rows)
        passes = self._passes(self.adapter, rows, Asked(entropy=objective.loss.needs_entropy))
        stats, _ = passes.stats(passes.plan())
        mask = _counts(objective.rows).to(stats.logprobs.device)
        trained = objective.trained
        logprobs = _of_rows(stats.logprobs[mask], objective, trained)
        entropy = None
        if stats.entropy is not None and objective.loss.needs_entropy:
            entropy = _of_rows(stats.entropy[mask], objective, trained)
        with torch.no_grad():
            output = objective.evaluate(trained, logprobs, entropy)
        loss = float(output.loss_sum)
        if not math.isfinite(loss):
            text = f"The loss ({loss:g}) is not finite."
            raise SignalError("non_finite", text, param="batch_data")
        return Value(loss, objective.metrics([output.metrics]), stats.logprobs)

    def _prepare(self) -> None:
        """What the loss asks for before its own pass."""
        objective = self.objective
        if objective.needs_reference:
            objective.set_reference(self._logprobs("reference", None, objective.rows))
        if objective.statistic_rows:
            rows = [objective.rows[index] for index in objective.statistic_rows]
            objective.set_statistics(self._logprobs("statistics", self.adapter, rows))

    def _logprobs(self, name: str, adapter: Parameters | None, rows: Sequence[Row]) -> Tensor:
        """Of all `rows`, by the plan `name` of the recorded ones."""
        passes = self._passes(adapter, rows)
        units: list[Unit] = [(row,) for row in range(len(rows))]
        recorded = self._recorded
        if recorded is None:
            plan = passes.plan(units)
        else:
            own = recorded.get(name) if isinstance(recorded, Mapping) else None
            plan = Plan.from_json(own, units)
        stats, plan = passes.stats(plan)
        self._plan[name] = plan.to_json()
        return stats.logprobs

    def _passes(
        self, adapter: Parameters | None, rows: Sequence[Row], asked: Asked | None = None
    ) -> Passes:
        return Passes(
            self.base,
            adapter,
            rows,
            checkpoint=self.checkpoint,
            stream=self.stream,
            asked=asked,
            budget=self._budget,
        )

    def _not_finite(self, passes: Passes, sums: Sums) -> SignalError:
        row = passes.culprit(sums.plan, self.objective.evaluate)
        example = None if row is None else self.objective.example(row)
        which = "of the batch" if example is None else f"of example {example}"
        return SignalError(
            "non_finite",
            f"The loss {which} ({sums.loss:g} in all) or its gradient is not finite; nothing was changed.",
            param="batch_data" if example is None else f"batch_data.{example}",
        )


def _counts(rows: Sequence[Row]) -> Tensor:
    """Whether the loss counts it, of every entry of `rows` [E]."""
    parts = [np.frombuffer(memoryview(row.weights), np.float32) for row in rows]
    return torch.from_numpy(np.concatenate(parts) != 0)


def _of_rows(numbers: Tensor, objective: Objective, indices: Sequence[int]) -> Tensor:
    """Of numbers of the counted entries of all rows, those of the rows `indices`."""
    split = torch.split(numbers, objective.sizes)
    return torch.cat([split[index] for index in indices])
