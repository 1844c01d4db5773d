"""A training loop over one run: batches in, numbers out, with a local history of them."""

from __future__ import annotations

import math
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import length_hint
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rewardsignal._exceptions import OperationFailedError, SignalAPIError, SignalTimeoutError
from rewardsignal._futures import APIFuture
from rewardsignal._operations import Batch
from rewardsignal._records import Record
from rewardsignal._schemas import ForwardBackwardResult, OptimStepResult, SaveStateResult

if TYPE_CHECKING:
    from rewardsignal._run import SignalRun

HISTORY = 1000
# Batches under way: the worker has the next one while this process reads the last one's numbers.
DEPTH = 4


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BatchResult(Record):
    """A batch that was trained on: a gradient and a step."""

    loss: float
    grad_norm: float
    """Of the step, before clipping."""
    learning_rate: float
    step: int
    """Optimizer steps taken, this one included."""
    num_tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EpochResult(Record):
    """A pass over the batches."""

    num_batches: int
    avg_loss: float
    """Mean over the batches; nan of no batch."""
    avg_grad_norm: float
    final_step: int


class TrainingClient:
    """Trains one run; made by `run.training()` or `client.training(run_id)`.

    The calls wait at most `timeout` seconds for a result; what was submitted goes on after that.
    """

    def __init__(self, run: SignalRun, timeout: float | None = 3600.0) -> None:
        """Sends nothing."""
        self.run, self.timeout = run, timeout
        self._history: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in ("loss", "grad_norm", "learning_rate")
        }

    def forward_backward(
        self, batch: Batch, loss_fn: str = "causal_lm", **loss_kwargs: Any
    ) -> ForwardBackwardResult:
        """Compute a loss and add its gradient to the accumulation."""
        result = self.run.forward_backward_async(batch, loss_fn, **loss_kwargs).result(self.timeout)
        self._history["loss"].append(result.loss)
        return result

    def optim_step(self, learning_rate: float | None = None, **options: Any) -> OptimStepResult:
        """Take an optimizer step."""
        result = self.run.optim_step_async(learning_rate, **options).result(self.timeout)
        self._note(result)
        return result

    def train_batch(
        self,
        batch: Batch,
        loss_fn: str = "causal_lm",
        learning_rate: float | None = None,
        **loss_kwargs: Any,
    ) -> BatchResult:
        """A gradient and a step, submitted together."""
        return self._trained(self._submit(batch, loss_fn, learning_rate, loss_kwargs))

    def train_epoch(
        self,
        batches: Iterable[Batch],
        loss_fn: str = "causal_lm",
        learning_rate: float | None = None,
        *,
        progress: bool = True,
        **loss_kwargs: Any,
    ) -> EpochResult:
        """Train on every batch, a step each, with a progress bar on a terminal or in a notebook.

        A few batches are under way at once. Raises what the first batch that fails raises; those that
        were submitted behind it have then ended too.
        """
        losses, norms, step = [], [], self.run.info.current_step
        under_way: deque[_Pair] = deque()
        # By its length where it has one; batches by tokens have the method and no length.
        total = length_hint(batches) or None
        shown = progress and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        with _bar(total, shown) as bar:

            def take() -> None:
                nonlocal step
                result = self._trained(under_way.popleft())
                losses.append(result.loss)
                norms.append(result.grad_norm)
                step = result.step
                bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
                bar.update()

            try:
                for batch in batches:
                    under_way.append(self._submit(batch, loss_fn, learning_rate, loss_kwargs))
                    if len(under_way) >= DEPTH:
                        take()
                while under_way:
                    take()
            except SignalAPIError:
                self._await_ends(under_way)
                raise
        return EpochResult(
            num_batches=len(losses),
            avg_loss=_mean(losses),
            avg_grad_norm=_mean(norms),
            final_step=step,
        )

    def save_checkpoint(self, name: str | None = None, mode: str = "adapter") -> SaveStateResult:
        """Save the adapter; the mode "state" keeps the optimizer with it."""
        return self.run.save_state_async(name, mode).result(self.timeout)

    def get_metrics(self) -> dict[str, list[float]]:
        """The last 1,000 losses, gradient norms and learning rates of this client."""
        return {name: list(values) for name, values in self._history.items()}

    def close(self) -> None:
        """Nothing to close: the connections are the client's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TrainingClient of {self.run!r}>"

    def _submit(
        self,
        batch: Batch,
        loss_fn: str,
        learning_rate: float | None,
        loss_kwargs: Mapping[str, Any],
    ) -> _Pair:
        forward = self.run.forward_backward_async(batch, loss_fn, **loss_kwargs)
        return forward, self.run.optim_step_async(learning_rate)

    def _await_ends(self, pairs: Iterable[_Pair]) -> None:
        for pair in pairs:
            for future in pair:
                with suppress(SignalTimeoutError):
                    future.exception(self.timeout)

    def _trained(self, pair: _Pair) -> BatchResult:
        try:
            forward = pair[0].result(self.timeout)
        except OperationFailedError:
            # Its step fails too; what is raised is the reason, once nothing of the batch is under way.
            self._await_ends([pair])
            raise
        step = pair[1].result(self.timeout)
        self._history["loss"].append(forward.loss)
        self._note(step)
        return BatchResult(
            loss=forward.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            step=step.step,
            num_tokens=forward.num_tokens,
            metrics={**forward.metrics, **step.metrics},
        )

    def _note(self, step: OptimStepResult) -> None:
        self._history["grad_norm"].append(step.grad_norm)
        self._history["learning_rate"].append(step.learning_rate)


_Pair = tuple[APIFuture[ForwardBackwardResult], APIFuture[OptimStepResult]]


def _bar(total: int | None, shown: bool) -> Any:
    with warnings.catch_warnings():
        # In a notebook without ipywidgets it says, as it is imported, that its bar will be one of text.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm(total=total, unit="batch", disable=not shown)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
