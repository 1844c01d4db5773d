"""A pipeline: operations that are collected and submitted together.

    with run.pipeline() as pipe:
        for batch in batches:
            losses.append(pipe.forward_backward(batch))
            pipe.optim_step(learning_rate=1e-4)

One request carries up to `max_operations` of them; asking a held-back future for anything sends what is
collected. When the block ends in an exception, what was not sent is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from rewardsignal import _operations as bodies
from rewardsignal._exceptions import ConflictError
from rewardsignal._futures import APIFuture
from rewardsignal._operations import Batch, Prompts
from rewardsignal._schemas import (
    MAX_OPERATIONS,
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    OptimStepOptions,
    OptimStepResult,
    SampleOptions,
    SampleResult,
    SaveStateResult,
)
from rewardsignal._submit import MAX_BYTES, Held, Submitter


class Pipeline:
    """Collects operations of one run. Made by `run.pipeline()`."""

    def __init__(self, submitter: Submitter, max_operations: int) -> None:
        """`max_operations` is how many are collected before they are sent."""
        self._submitter = submitter
        self._most = max(1, min(max_operations, MAX_OPERATIONS))
        self._lock = threading.RLock()
        self._held: list[Held] = []
        self._size = 0

    def forward_backward(
        self,
        batch: Batch,
        loss_fn: str = "causal_lm",
        *,
        accumulate: bool = True,
        logprobs: bool = False,
        **loss_kwargs: Any,
    ) -> APIFuture[ForwardBackwardResult]:
        """Add a `forward_backward`."""
        body = bodies.forward_backward(batch, loss_fn, accumulate, loss_kwargs, logprobs)
        return self._add("forward_backward", body)

    def forward(
        self, batch: Batch, *, top_k: int = 0, prompt_logprobs: bool = False
    ) -> APIFuture[ForwardResult]:
        """Add a `forward`."""
        return self._add("forward", bodies.forward(batch, top_k, prompt_logprobs))

    def optim_step(
        self, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> APIFuture[OptimStepResult]:
        """Add an `optim_step`."""
        return self._add("optim_step", bodies.optim_step(learning_rate, options))

    def sample(self, prompts: Prompts, **options: Unpack[SampleOptions]) -> APIFuture[SampleResult]:
        """Add a `sample`."""
        return self._add("sample", bodies.sample(prompts, options))

    def save_state(
        self, name: str | None = None, mode: str = "adapter"
    ) -> APIFuture[SaveStateResult]:
        """Add a `save_state`."""
        return self._add("save_state", bodies.save_state(name, mode))

    def load_state(
        self, artifact: str, *, run_id: str | None = None, optimizer: bool = True
    ) -> APIFuture[LoadStateResult]:
        """Add a `load_state`."""
        return self._add("load_state", bodies.load_state(artifact, run_id, optimizer))

    def flush(self) -> None:
        """Send what is collected. Raises what the server refused."""
        with self._lock:
            held, self._held, self._size = self._held, [], 0
            if held:
                self._submitter.send(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        else:
            self._drop()

    def _add(self, kind: str, body: Mapping[str, Any]) -> APIFuture[Any]:
        with self._lock:
            future, held = self._submitter.hold(kind, body, self._send_held)
            self._held += held
            self._size += sum(len(content) for _, content in held)
            if len(self._held) >= self._most or self._size >= MAX_BYTES:
                self._full()
            return future

    def _full(self) -> None:
        self.flush()

    def _send_held(self) -> None:
        """Asked by a future that is held back."""
        self.flush()

    def _drop(self) -> None:
        with self._lock:
            held, self._held, self._size = self._held, [], 0
        for future, _ in held:
            future.refuse(ConflictError("The pipeline ended in an exception before it was sent."))
