"""What of an AsyncSignalClient is not a call of SignalClient in a thread: how it opens and closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack

from rewardsignal._async_base import Hops
from rewardsignal._async_run import AsyncSignalRun
from rewardsignal._client import SignalClient
from rewardsignal._futures import APIFuture
from rewardsignal._operations import Batch, Prompts
from rewardsignal._run import SignalRun
from rewardsignal._schemas import (
    ForwardBackwardResult,
    OptimStepOptions,
    OptimStepResult,
    SampleOptions,
    SampleResult,
    SaveStateResult,
)

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClientBase:
    """A synchronous client and the threads that call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what SignalClient takes. Opens no connection."""
        self._client = SignalClient(*args, **kwargs)
        self._client._poller.in_loops = True
        self._hops = Hops()
        self._runs: dict[str, Future[SignalRun]] = {}
        self._async_runs: dict[str, AsyncSignalRun] = {}

    @property
    def base_url(self) -> str:
        """The server's address."""
        return self._client.base_url

    async def forward_backward_async(
        self,
        run_id: str,
        batch: Batch,
        accumulate: bool = True,
        loss_fn: str = "causal_lm",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> APIFuture[ForwardBackwardResult]:
        """Submit a `forward_backward` of a run."""
        run = await self._known(run_id)
        return await run.forward_backward_async(
            batch, loss_fn, accumulate=accumulate, **(loss_kwargs or {})
        )

    async def optim_step_async(
        self, run_id: str, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> APIFuture[OptimStepResult]:
        """Submit an `optim_step` of a run."""
        return await (await self._known(run_id)).optim_step_async(learning_rate, **options)

    async def sample_async(
        self, run_id: str, prompts: Prompts, **options: Unpack[SampleOptions]
    ) -> APIFuture[SampleResult]:
        """Submit a `sample` of a run."""
        return await (await self._known(run_id)).sample_async(prompts, **options)

    async def save_state_async(
        self, run_id: str, mode: str = "adapter", name: str | None = None
    ) -> APIFuture[SaveStateResult]:
        """Submit a `save_state` of a run."""
        return await (await self._known(run_id)).save_state_async(name, mode)

    async def _known(self, run_id: str) -> AsyncSignalRun:
        """The run of that id, with one lane for all calls; those wait for it in their order."""
        finding = self._runs.get(run_id)
        if finding is None or (finding.done() and finding.exception() is not None):
            finding = self._runs[run_id] = self._hops.executor.submit(self._client._known, run_id)
        run = await asyncio.wrap_future(finding)
        return self._async_runs.setdefault(run_id, AsyncSignalRun(run, self._hops))

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._hops.call(function, *args, **kwargs)

    async def close(self) -> None:
        """Close the connections; runs on the server go on."""
        self._client.close()
        self._hops.executor.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncSignalClient {self.base_url}>"
