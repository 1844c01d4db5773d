"""One run on a base: its adapter, its accumulated gradients, its optimizer.

Every operation is atomic: it computes into memory of its own and joins the run's state in one assignment
at the end, so that one that fails leaves no trace. Several trainers may share a base, one operation
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.accumulation import Accumulation
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base
from workers.engine.batch import check_rows
from workers.engine.counted import of_every_entry
from workers.engine.export import export_adapter
from workers.engine.gradient import Call
from workers.engine.lora import Adapter, LoraSpec
from workers.engine.losses import DIVISORS, resolve_loss
from workers.engine.objective import Objective
from workers.engine.optimizer import make_optimizer
from workers.engine.parameters import Parameters
from workers.engine.passes import Asked, Passes
from workers.engine.sampler import SampleKey, SampleOutput, SampleParams, TextDecoder, sample
from workers.engine.schedule import Schedule
from workers.engine.scoring import scored_rows, wire_rows
from workers.engine.state import (
    GRADIENT,
    WEIGHTS,
    Part,
    TrainerState,
    check_names,
    check_tensors,
    copies,
)

if TYPE_CHECKING:
    from workers.text.rows import Row


class Trainer:
    """A run's training state and its primitives."""

    def __init__(
        self,
        base: Base,
        lora: LoraSpec,
        adamw: AdamWSettings,
        *,
        gradient_checkpointing: bool = False,
        optimizer: str = "adamw",
        schedule: Schedule | None = None,
    ) -> None:
        """Raises SignalError, with the setting's name, for what the base or its device cannot do."""
        self.schedule = schedule or Schedule()
        self.base, self.settings, self.gradient_checkpointing = base, adamw, gradient_checkpointing
        self.adapter = _parameters(base, lora)
        self.optimizer = make_optimizer(optimizer, self.adapter.master)
        self.budget = base.new_budget()
        self._accumulation: Accumulation | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.optimizer.steps

    @property
    def accumulated(self) -> int:
        """Calls of forward_backward since the last optimizer step."""
        return self._accumulation.calls if self._accumulation is not None else 0

    @property
    def num_trainable_parameters(self) -> int:
        """Numbers that are trained."""
        return self.adapter.master.numel()

    def forward_backward(
        self,
        rows: Sequence[Row],
        loss_fn: str,
        loss_kwargs: Mapping[str, Any],
        accumulate: bool = True,
        *,
        plan: Any = None,
        seq: int = 0,
        logprobs: bool = False,
    ) -> dict[str, Any]:
        """Add the gradient of `loss_fn` on `rows` to the accumulation (`accumulate` false: replace it).

        The result: loss (nats; divided by what the loss is a mean over, for a sum by num_tokens), loss_sum,
        divisor (what loss_sum was divided by), num_tokens (entries of a weight other than 0), grad_norm (L2,
        as it would be applied alone), accumulated_grad_norm (of all `accumulated_calls`, as it would be
        applied now), metrics (of the loss; means) with the metric_counts that they are over, step, rows (with
        `logprobs`, as `scoring.scored_rows` makes them; else None), and the `plan` by which it was computed
        (JSON). `plan` computes by an earlier one, bit for bit as it was; `seq` keys the dropout. Raises
        SignalError unknown_loss,
        unknown_option, mixed_reductions, no_target_tokens, token_out_of_range, sequence_too_long,
        validation_error, non_finite (with the example's name), out_of_memory.
        """
        loss = resolve_loss(loss_fn, loss_kwargs)
        earlier = self._accumulation if accumulate else None
        if earlier is not None and earlier.reduction != loss.reduction:
            raise SignalError("mixed_reductions", param="loss_fn")
        base, adapter = self.base, self.adapter
        self._check(rows, everything=logprobs)
        objective = Objective(loss, rows, base.device, adapter.master.dtype)
        checkpoint = self.gradient_checkpointing
        call = Call(
            base,
            adapter,
            objective,
            checkpoint=checkpoint,
            stream=seq,
            plan=plan,
            budget=self.budget,
            scores=logprobs,
        )
        found = call.gradient()
        weight = objective.constants[DIVISORS.get(loss.reduction, "weight")]
        new = Accumulation(found.gradient, weight, loss.reduction, 1)
        counted = objective.num_tokens or 1
        divisor = float(counted if loss.reduction == "sum" else objective.divisor)
        total = new if earlier is None else earlier.joined(new)
        result = {
            "loss": found.loss_sum / divisor,
            "loss_sum": found.loss_sum,
            "divisor": divisor,
            "num_tokens": objective.num_tokens,
            "grad_norm": found.norm / new.divisor,
            "accumulated_grad_norm": total.norm() if earlier else found.norm / new.divisor,
            "accumulated_calls": total.calls,
            "metrics": {name: value for name, (value, _) in found.metrics.items()},
            "metric_counts": {name: count for name, (_, count) in found.metrics.items()},
            "step": self.step,
            "rows": None if found.scores is None else scored_rows(rows, found.scores),
            "plan": found.plan,
        }
        self._accumulation = total
        return result

    def forward(self, rows: Sequence[Row], top_k: int = 0) -> dict[str, Any]:
        """Log-probabilities of the entries of `rows` whose weight is not 0; nothing is changed or dropped.

        The result: rows as `scoring.wire_rows` makes them, with the `top_k` likeliest tokens of each
        position, weights_step, metrics. Raises SignalError token_out_of_range, sequence_too_long, non_finite,
        out_of_memory.
        """
        base = self.base
        self._check(rows)
        passes = Passes(base, self.adapter, rows, asked=Asked(top=top_k), budget=self.budget)
        stats, _ = passes.stats(passes.plan())
        return {
            "weights_step": self.step,
            "rows": wire_rows(rows, stats.logprobs, stats.top_ids, stats.top_logprobs),
            "metrics": {"num_tokens": float(len(stats.logprobs))},
        }

    def evaluate(
        self, rows: Sequence[Row], loss_fn: str, loss_kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The loss of `rows` as `forward_backward` computes it, without a gradient; nothing is changed or
        dropped.

        The result: loss_sum in nats, num_tokens, metrics (of the loss), rows (as `scoring.scored_rows`
        makes them), weights_step. Raises SignalError as forward_backward, but for mixed_reductions.
        """
        base = self.base
        loss = resolve_loss(loss_fn, loss_kwargs)
        self._check(rows, everything=True)
        objective = Objective(loss, rows, base.device, self.adapter.master.dtype)
        found = Call(base, self.adapter, objective, budget=self.budget).value()
        return {
            "weights_step": self.step,
            "loss_sum": found.loss_sum,
            "num_tokens": objective.num_tokens,
            "rows": scored_rows(rows, found.scores),
            "metrics": {
                "num_tokens": float(objective.num_tokens),
                **{name: value for name, (value, _) in found.metrics.items()},
            },
        }

    def optim_step(self, **overrides: float | None) -> dict[str, Any]:
        """Apply the accumulated gradient; `overrides` of the optimizer's settings hold for this step alone.

        The learning rate is the schedule's unless it is overridden. The result: step, learning_rate,
        grad_norm (before clipping), metrics, and the `plan`: every setting that the step was taken with,
        which as overrides repeat it under other defaults. Raises SignalError no_gradients; and, with the
        accumulation discarded and no step taken, unknown_option, validation_error or non_finite.
        """
        accumulation = self._accumulation
        if accumulation is None:
            raise SignalError("no_gradients")
        try:
            norm, settings = self._step(accumulation, overrides)
        except SignalError as error:
            self.clear_accumulation()
            raise _and_cleared(error) from error
        self.adapter.renew()
        self._accumulation = None
        return {
            "step": self.step,
            "learning_rate": settings.learning_rate,
            "grad_norm": norm,
            "metrics": {},
            "plan": asdict(settings),
        }

    def _step(
        self, accumulation: Accumulation, overrides: Mapping[str, float | None]
    ) -> tuple[float, AdamWSettings]:
        """Take the step, or raise SignalError with weights and moments as they were."""
        rate = self.settings.learning_rate * self.schedule.factor(self.step)
        settings = replace(self.settings, learning_rate=rate).overridden(overrides)
        gradient = accumulation.gradient / accumulation.divisor
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            raise SignalError("non_finite", "The accumulated gradient is not finite.")
        self.optimizer.step(gradient, norm, settings)
        return norm, settings

    def clear_accumulation(self) -> None:
        """Discard the gradients since the last optimizer step."""
        self._accumulation = None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SampleParams,
        tokenizer: TextDecoder,
        should_stop: Callable[[], bool],
        key: SampleKey,
    ) -> SampleOutput:
        """Continue `prompts` from the current weights; see `sampler.sample`."""
        return sample(self.base, prompts, params, tokenizer, should_stop, key, self.adapter)

    def export_adapter(self, folder: Path, base_model_name: str) -> list[Path]:
        """Write the adapter to `folder` as a plain PEFT one, or the whole model as transformers'; the
        files."""
        return export_adapter(self.adapter, folder, base_model_name)

    def capture(self) -> TrainerState:
        """A copy of everything that later operations depend on; milliseconds, and nothing is changed."""
        adapter, optimizer = self.adapter.state(), self.optimizer.state()
        tensors = adapter.tensors | optimizer.tensors
        accumulation = None
        if self._accumulation is not None:
            gradient, accumulation = self._accumulation.state()
            tensors |= gradient
        facts = {
            "layout": adapter.facts,
            "optimizer": optimizer.facts,
            "accumulation": accumulation,
        }
        return TrainerState(copies(tensors), facts)

    def restore(self, state: TrainerState) -> None:
        """Become what was captured; everything after is bit for bit as if it had gone on from there.

        Raises SignalError state_mismatch, with nothing changed, that names the tensor or the fact which
        is not this run's.
        """
        accumulation = self._accepted(state)
        self.adapter.load(Part(state.tensors, state.facts["layout"]))
        self.optimizer.load(Part(state.tensors, state.facts["optimizer"]))
        self._accumulation = accumulation

    def _check(self, rows: Sequence[Row], *, everything: bool = False) -> None:
        """Raises SignalError for what the model cannot take; `everything`: also of what is not counted."""
        base, checked = self.base, of_every_entry(rows) if everything else rows
        check_rows(checked, vocab_size=base.vocab_size, context_length=base.context_length)

    def _accepted(self, state: TrainerState) -> Accumulation | None:
        """Checks all of `state`; its accumulation in memory of this run."""
        facts = state.facts
        check_names(facts, dict.fromkeys(("layout", "optimizer", "accumulation")), "the fact")
        self.adapter.check(facts["layout"])
        self.optimizer.check(facts["optimizer"])
        expected = self.adapter.state().tensors | self.optimizer.state().tensors
        if facts["accumulation"] is None:
            check_tensors(state.tensors, expected)
            return None
        check_tensors(state.tensors, expected | {GRADIENT: self.adapter.master})
        return Accumulation.of(Part(state.tensors, facts["accumulation"]), self.base.device)

    def restore_weights(self, weights: Tensor) -> None:
        """Begin anew from these master weights [P] (of `Adapter.flat`): no moments, no steps, no gradients.

        Raises SignalError state_mismatch with nothing changed.
        """
        check_tensors({WEIGHTS: weights}, self.adapter.state().tensors)
        self.adapter.load(Part({WEIGHTS: weights}, self.adapter.layout))
        self.optimizer.reset()
        self._accumulation = None


def _parameters(base: Base, spec: LoraSpec) -> Parameters:
    """What the run trains: rank 0 is every parameter of the model."""
    if spec.r:
        return Adapter(spec, base.decoder.layers)
    from workers.engine.full import FullWeights

    return FullWeights(spec, base)


def _and_cleared(error: SignalError) -> SignalError:
    message = f"{error.message} No step was taken; the accumulated gradients were discarded."
    return SignalError(error.code, message, param=error.param)
