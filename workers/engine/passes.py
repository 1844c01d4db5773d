"""The passes of one operation: micro-batch after micro-batch through the model, summed in the order of a
plan.

A micro-batch adds to the sum only when all of it has been computed, so that one which runs out of memory can
be halved and done again: the numbers are those of the plan as it ends up, from wherever it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.batch import Batch, make_batch
from workers.engine.decoder import Pass, positions
from workers.engine.dropout import Dropout
from workers.engine.logprob import TokenStats, token_stats
from workers.engine.memory import Peak, is_out_of_memory
from workers.engine.parameters import Parameters
from workers.engine.plan import Plan, Unit, make_plan

if TYPE_CHECKING:
    from workers.text.rows import Row

Made = TypeVar("Made")
# The sum of a loss over a micro-batch from what the model says of its counted positions.
Evaluate = Callable[[Batch, TokenStats], Tensor]


@dataclass(frozen=True)
class Asked:
    """What a pass is to give besides log-probabilities: the entropy, and the `top` likeliest tokens."""

    entropy: bool = False
    top: int = 0


@dataclass(frozen=True)
class Sums:
    """What all micro-batches add up to: the loss in nats, its gradient [P], and the plan it was made by."""

    loss: float
    gradient: Tensor
    norm: float
    plan: Plan


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
        dtype: torch.dtype | None = None,
    ) -> None:
        """`stream` is the operation's seq, which its dropout is keyed by; `dtype` that of the weights."""
        self.base, self.adapter, self.rows = base, adapter, rows
        self.checkpoint, self.stream, self.asked = checkpoint, stream, asked or Asked()
        self.dtype = dtype or (adapter.master.dtype if adapter is not None else torch.float32)

    def plan(self, units: Sequence[Unit] | None = None) -> Plan:
        """How the rows go through the model now, by the memory that is free."""
        decoder = self.base.decoder
        return make_plan(
            [len(row.tokens) for row in self.rows],
            self.base.budget.tokens(self.checkpoint),
            decoder.kernel,
            units,
            padded=decoder.kernel == "padded",
        )

    def gradient(self, plan: Plan, evaluate: Evaluate) -> Sums:
        """The sum of the loss over all rows and its gradient by the adapter's numbers.

        Raises SignalError out_of_memory when one unit alone does not fit.
        """
        losses: list[Tensor] = []
        gradient: Tensor | None = None

        def take(made: tuple[Tensor, Tensor]) -> None:
            nonlocal gradient
            losses.append(made[0])
            gradient = made[1] if gradient is None else gradient.add_(made[1])

        plan = self._through(plan, lambda units: self._slope(units, plan.kernel, evaluate), take)
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient)
        # One transfer: on a GPU each .item() waits for all that is queued.
        value, length = torch.stack((torch.stack(losses).sum().to(norm.dtype), norm)).tolist()
        return Sums(value, gradient, length, plan)

    def stats(self, plan: Plan) -> tuple[list[tuple[Batch, TokenStats]], Plan]:
        """What the model says of the counted positions of each micro-batch, without a derivative."""
        found: list[tuple[Batch, TokenStats]] = []
        with torch.no_grad(), self.base.activated(self.adapter):
            plan = self._through(
                plan, lambda units: self._forward(units, plan.kernel), found.append
            )
        return found, plan

    def culprit(self, plan: Plan, evaluate: Evaluate) -> int | None:
        """The first row, in the order of the batch, whose loss or gradient alone is not finite."""
        for unit in sorted(unit for batch in plan.batches for unit in batch):
            loss, gradient = self._slope((unit,), plan.kernel, evaluate)
            if not (torch.isfinite(loss) and torch.isfinite(gradient).all()):
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
            row = plan.batches[number][0][0]
            raise SignalError(
                "out_of_memory",
                f"Row {row} with its {tokens} tokens does not fit the device's memory by itself; the run is "
                "unchanged. Shorten it, or use gradient_checkpointing.",
                param=f"batch_data.{row}",
            ) from None
        self.base.budget.overrun(tokens)
        return halved

    def _slope(
        self, units: tuple[Unit, ...], kernel: str, evaluate: Evaluate
    ) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch and its flat gradient [P]."""
        assert self.adapter is not None
        peak, master = Peak(self.base.device), self.adapter.master
        with self.base.activated(self.adapter):
            batch, stats = self._forward(units, kernel)
            loss = evaluate(batch, stats)
            if not loss.requires_grad:
                return loss, torch.zeros_like(master)
            parts = torch.autograd.grad(
                loss, self.adapter.leaves, allow_unused=True, materialize_grads=True
            )
        self.base.budget.measured(self.checkpoint, len(batch.tokens), peak.taken())
        return loss.detach(), torch.cat([part.reshape(-1) for part in parts]).to(master.dtype)

    def _forward(self, units: tuple[Unit, ...], kernel: str) -> tuple[Batch, TokenStats]:
        base, chosen = self.base, [row for unit in units for row in unit]
        batch = make_batch(self.rows, chosen, device=base.device, dtype=self.dtype)
        if not batch.num_tokens:
            return batch, TokenStats(batch.weights, batch.weights)
        how = Pass(batch.lengths, kernel, self.checkpoint, self._dropout(batch))
        hidden = base.decoder.hidden(batch.tokens, how)
        if batch.num_tokens < len(hidden):
            hidden = hidden.index_select(0, batch.index)
        asked = self.asked
        return batch, token_stats(
            hidden, batch.targets, base.decoder.head, entropy=asked.entropy, top=asked.top
        )

    def _dropout(self, batch: Batch) -> Dropout | None:
        if self.adapter is None or not self.adapter.spec.dropout:
            return None
        device, spec = self.base.device, self.adapter.spec
        lengths = torch.tensor(batch.lengths, device=device)
        rows = torch.tensor(batch.rows, device=device).repeat_interleave(lengths)
        places = positions(batch.lengths, device)
        return Dropout(spec.dropout, spec.seed, self.stream, rows, places)
