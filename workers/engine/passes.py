"""The passes of one operation: micro-batch after micro-batch through the model, summed in the order of a
plan.

A micro-batch adds to the sum only when all of it has been computed, so that one which runs out of memory can
be halved and done again: the numbers are those of the plan as it ends up, from wherever it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.batch import Batch, make_batch
from workers.engine.counted import counted, example_of, of_the_rest
from workers.engine.decoder import Pass, positions
from workers.engine.dropout import Dropout
from workers.engine.logprob import TokenStats, token_stats
from workers.engine.losses import LossOutput, Metrics
from workers.engine.memory import Budget, Peak, is_out_of_memory
from workers.engine.parameters import Parameters, master_dtype
from workers.engine.plan import Plan, Unit, make_plan

if TYPE_CHECKING:
    from workers.text.rows import Row

Made = TypeVar("Made")
# The loss of some rows of the operation, by their numbers, from the log-probabilities of their counted
# entries and, where asked for, the entropies.
Evaluate = Callable[[Sequence[int], Tensor, Tensor | None], LossOutput]


@dataclass(frozen=True)
class Asked:
    """What a pass is to give besides log-probabilities: the entropy, the `top` likeliest tokens, and of
    every entry its log-probability, with `everything` those of weight 0 among them."""

    entropy: bool = False
    top: int = 0
    everything: bool = False


@dataclass(frozen=True)
class Sums:
    """What all micro-batches add up to: the loss in nats, its gradient [P] with its L2 norm, the metrics of
    each, and the plan it was made by; `scores` [E], where asked for, the log-probabilities of every entry
    of every row in nats."""

    loss: float
    gradient: Tensor
    norm: float
    metrics: list[Metrics]
    plan: Plan
    scores: Tensor | None = None


@dataclass(frozen=True)
class Slope:
    """Of one micro-batch: its loss, the flat gradient [P] of that, and per row the log-probabilities of every
    entry, where asked for."""

    output: LossOutput
    gradient: Tensor
    scores: dict[int, Tensor]


class Passes:
    """An operation of a run: its rows, its adapter (None: the bare base), and how they are computed."""

    def __init__(
        self,
        base: Base,
        adapter: Parameters | None,
        rows: Sequence[Row],
        *,
        checkpoint: bool = False,
        stream: int = 0,
        asked: Asked | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`stream` is the operation's seq, which its dropout is keyed by; `budget` is the run's, by default
        a new one."""
        self.budget = budget or base.new_budget()
        self.base, self.adapter, self.rows = base, adapter, rows
        self.checkpoint, self.stream, self.asked = checkpoint, stream, asked or Asked()
        self._rest = of_the_rest(rows) if self.asked.everything else None

    def plan(self, units: Sequence[Unit] | None = None) -> Plan:
        """How the rows go through the model now, by the memory that is free."""
        decoder = self.base.decoder
        return make_plan(
            [len(row.tokens) for row in self.rows],
            self.budget.tokens(self.checkpoint),
            decoder.kernel,
            units,
            padded=decoder.kernel == "padded",
        )

    def gradient(self, plan: Plan, evaluate: Evaluate) -> Sums:
        """The sum of the loss over the rows of `plan` and its gradient by the adapter's numbers.

        Raises SignalError out_of_memory when one unit alone does not fit.
        """
        losses: list[Tensor] = []
        metrics: list[Metrics] = []
        scores: dict[int, Tensor] = {}
        gradient: Tensor | None = None

        def take(made: Slope) -> None:
            nonlocal gradient
            losses.append(made.output.loss_sum)
            metrics.append(made.output.metrics)
            scores.update(made.scores)
            gradient = made.gradient if gradient is None else gradient.add_(made.gradient)

        plan = self._through(plan, lambda units: self._slope(units, plan.kernel, evaluate), take)
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient)
        # One transfer: on a GPU each .item() waits for all that is queued.
        value, length = torch.stack((torch.stack(losses).sum().to(norm.dtype), norm)).tolist()
        ordered = torch.cat([scores[row] for row in sorted(scores)]) if scores else None
        return Sums(value, gradient, length, metrics, plan, ordered)

    def stats(self, plan: Plan) -> tuple[TokenStats, Plan]:
        """What the model says of the counted entries of all rows of `plan`, rows in the order of the
        operation, without a derivative and with nothing dropped."""
        found: list[tuple[Batch, TokenStats]] = []
        with torch.no_grad(), self.base.activated(self.adapter):
            plan = self._through(
                plan, lambda units: self._forward(units, plan.kernel), found.append
            )
        sizes = counted(self.rows).sizes(len(self.rows))

        def ordered(parts: list[Tensor | None]) -> Tensor | None:
            by_row: dict[int, Tensor] = {}
            for (batch, _), part in zip(found, parts, strict=True):
                if part is None:
                    return None
                split = torch.split(part, [sizes[row] for row in batch.rows])
                by_row.update(zip(batch.rows, split, strict=True))
            return torch.cat([by_row[row] for row in sorted(by_row)])

        logprobs = ordered([stats.logprobs for _, stats in found])
        assert logprobs is not None
        return TokenStats(
            logprobs,
            ordered([stats.entropy for _, stats in found]),
            ordered([stats.top_ids for _, stats in found]),
            ordered([stats.top_logprobs for _, stats in found]),
        ), plan

    def culprit(self, plan: Plan, evaluate: Evaluate) -> int | None:
        """The first row, in the order of the batch, whose loss or gradient alone is not finite."""
        for unit in sorted(unit for batch in plan.batches for unit in batch):
            slope = self._slope((unit,), plan.kernel, evaluate)
            if not (torch.isfinite(slope.output.loss_sum) and torch.isfinite(slope.gradient).all()):
                return unit[0]
        return None

    def _through(
        self, plan: Plan, work: Callable[[tuple[Unit, ...]], Made], take: Callable[[Made], None]
    ) -> Plan:
        number = 0
        while number < len(plan.batches):
            halved = None
            try:
                take(work(plan.batches[number]))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                halved = self._smaller(plan, number)
            if halved is None:
                number += 1
                if number < len(plan.batches):
                    self.base.pause()
                continue
            # Behind the except clause, whose error holds the memory of the pass.
            plan = halved
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
        return plan

    def _smaller(self, plan: Plan, number: int) -> Plan:
        tokens = sum(len(self.rows[row].tokens) for unit in plan.batches[number] for row in unit)
        halved = plan.halved(number)
        if halved is None:
            example = example_of(self.rows, plan.batches[number][0][0])
            raise SignalError(
                "out_of_memory",
                f"Example {example} with its {tokens} tokens does not fit the device's memory by itself; the "
                "run is unchanged. Shorten it, or use gradient_checkpointing.",
                param=f"batch_data.{example}",
            ) from None
        self.budget.overrun(tokens)
        return halved

    def _slope(self, units: tuple[Unit, ...], kernel: str, evaluate: Evaluate) -> Slope:
        """One micro-batch."""
        assert self.adapter is not None
        peak, master = Peak(self.base.device), self.adapter.master
        with self.base.activated(self.adapter):
            batch, stats = self._forward(units, kernel)
            scores = self._scores(batch, stats)
            output = evaluate(batch.rows, stats.logprobs, stats.entropy)
            loss = output.loss_sum
            if not loss.requires_grad:
                return Slope(output, torch.zeros_like(master), scores)
            parts = torch.autograd.grad(
                loss, self.adapter.leaves, allow_unused=True, materialize_grads=True
            )
        self.budget.measured(self.checkpoint, len(batch.tokens), peak.taken())
        gradient = torch.cat([part.reshape(-1) for part in parts]).to(master.dtype)
        return Slope(LossOutput(loss.detach(), output.metrics), gradient, scores)

    def _scores(self, batch: Batch, stats: TokenStats) -> dict[int, Tensor]:
        """The log-probabilities of every entry of each row of the micro-batch, by the rows' numbers."""
        if self._rest is None:
            return {}
        found = {}
        for rows, logprobs in ((self.rows, stats.logprobs), (self._rest, stats.rest)):
            sizes = counted([rows[row] for row in batch.rows]).sizes(len(batch.rows))
            assert logprobs is not None
            found[rows is self.rows] = torch.split(logprobs.detach(), sizes)
        return {
            row: _merged(self.rows[row], counted_ones, others)
            for row, counted_ones, others in zip(batch.rows, found[True], found[False], strict=True)
        }

    def _forward(self, units: tuple[Unit, ...], kernel: str) -> tuple[Batch, TokenStats]:
        """What the model says of each counted entry of one micro-batch."""
        base, chosen, asked = self.base, [row for unit in units for row in unit], self.asked
        batch = make_batch(self.rows, chosen, base.device)
        if not len(batch.index) and self._rest is None:
            return batch, _nothing(base, asked)
        how = Pass(batch.lengths, kernel, self.checkpoint, self._dropout(batch))
        hidden = base.decoder.hidden(batch.tokens, how)
        rest = None if self._rest is None else self._rest_of(chosen, hidden)
        if not len(batch.index):
            return batch, replace(_nothing(base, asked), rest=rest)
        if not batch.every:
            hidden = hidden.index_select(0, batch.index)
        stats = token_stats(
            hidden, batch.targets, base.decoder.head, entropy=asked.entropy, top=asked.top
        )
        return batch, TokenStats(
            batch.entries(stats.logprobs),
            batch.spread(stats.entropy),
            batch.spread(stats.top_ids),
            batch.spread(stats.top_logprobs),
            rest,
        )

    def _rest_of(self, chosen: Sequence[int], hidden: Tensor) -> Tensor:
        """The log-probabilities of the entries that the loss does not count, without a derivative."""
        assert self._rest is not None
        base, batch = self.base, make_batch(self._rest, chosen, self.base.device)
        if not len(batch.index):
            return _nothing(base, Asked()).logprobs
        with torch.no_grad():
            states = hidden.detach()
            states = states if batch.every else states.index_select(0, batch.index)
            return batch.entries(token_stats(states, batch.targets, base.decoder.head).logprobs)

    def _dropout(self, batch: Batch) -> Dropout | None:
        if self.adapter is None or not self.adapter.spec.dropout or not torch.is_grad_enabled():
            return None
        device, spec = self.base.device, self.adapter.spec
        lengths = torch.tensor(batch.lengths, device=device)
        rows = torch.tensor(batch.rows, device=device).repeat_interleave(lengths)
        places = positions(batch.lengths, device)
        return Dropout(spec.dropout, spec.seed, self.stream, rows, places)


def _merged(row: Row, counted_ones: Tensor, others: Tensor) -> Tensor:
    """One number per entry of `row`, from those of its counted entries and of its others."""
    mask = torch.from_numpy(np.frombuffer(memoryview(row.weights), np.float32) != 0)
    mask = mask.to(counted_ones.device)
    merged = counted_ones.new_empty(len(mask))
    merged[mask], merged[~mask] = counted_ones, others
    return merged


def _nothing(base: Base, asked: Asked) -> TokenStats:
    none = torch.zeros(0, dtype=master_dtype(base.dtype), device=base.device)
    if not asked.top:
        return TokenStats(none, none)
    top = none.new_zeros(0, min(asked.top, base.decoder.head.weight.shape[0]))
    return TokenStats(none, none, top.long(), top)
