"""What of an AsyncSignalClient is not a call of SignalClient in a thread: how it opens and closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack

import httpx2

from rewardsignal import _operations as bodies
from rewardsignal._async_base import Hops
from rewardsignal._client import SignalClient
from rewardsignal._futures import APIFuture
from rewardsignal._lane import Lane
from rewardsignal._operations import Batch, Prompts
from rewardsignal._schemas import (
    ForwardBackwardResult,
    OptimStepOptions,
    OptimStepResult,
    SampleOptions,
    SampleResult,
    SaveStateResult,
)
from rewardsignal._submit import Submitter

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClientBase:
    """A synchronous client and the threads that call it."""

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
        *,
        retry_for: float = 60.0,
    ) -> None:
        """As SignalClient's: opens no connection. Raises AuthenticationError when there is no key."""
        self._client = SignalClient(api_key, base_url, timeout, transport, retry_for=retry_for)
        self._client._poller.in_loops = True
        self._hops = Hops()
        self._lanes: dict[str, Lane] = {}

    @property
    def base_url(self) -> str:
        """The server's address."""
        return self._client.base_url

    async def forward_backward(
        self,
        run_id: str,
        batch: Batch,
        accumulate: bool = True,
        loss_fn: str = "causal_lm",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> ForwardBackwardResult:
        """Compute a loss and add its gradient to the accumulation."""
        future = await self.forward_backward_async(run_id, batch, accumulate, loss_fn, loss_kwargs)
        return await future

    async def forward_backward_async(
        self,
        run_id: str,
        batch: Batch,
        accumulate: bool = True,
        loss_fn: str = "causal_lm",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> APIFuture[ForwardBackwardResult]:
        """Submit a `forward_backward` of a run."""
        body = bodies.forward_backward(batch, loss_fn, accumulate, loss_kwargs or {})
        return await self._put(run_id, "forward_backward", body)

    async def optim_step(
        self, run_id: str, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> OptimStepResult:
        """Take an optimizer step."""
        return await (await self.optim_step_async(run_id, learning_rate, **options))

    async def optim_step_async(
        self, run_id: str, learning_rate: float | None = None, **options: Unpack[OptimStepOptions]
    ) -> APIFuture[OptimStepResult]:
        """Submit an `optim_step` of a run."""
        return await self._put(run_id, "optim_step", bodies.optim_step(learning_rate, options))

    async def sample(
        self, run_id: str, prompts: Prompts, **options: Unpack[SampleOptions]
    ) -> list[str]:
        """The texts of samples; `(await client.run(run_id)).sample` gives all that is known of them."""
        return (await (await self.sample_async(run_id, prompts, **options))).texts

    async def sample_async(
        self, run_id: str, prompts: Prompts, **options: Unpack[SampleOptions]
    ) -> APIFuture[SampleResult]:
        """Submit a `sample` of a run."""
        return await self._put(run_id, "sample", bodies.sample(prompts, options))

    async def save_state(
        self, run_id: str, mode: str = "adapter", name: str | None = None
    ) -> SaveStateResult:
        """Save the adapter; the mode "state" keeps the optimizer with it."""
        return await (await self.save_state_async(run_id, mode, name))

    async def save_state_async(
        self, run_id: str, mode: str = "adapter", name: str | None = None
    ) -> APIFuture[SaveStateResult]:
        """Submit a `save_state` of a run."""
        return await self._put(run_id, "save_state", bodies.save_state(name, mode))

    async def _put(self, run_id: str, kind: str, body: Mapping[str, Any]) -> APIFuture[Any]:
        """Into the one lane of that run, in the order of the calls."""
        lane = self._lanes.get(run_id)
        if lane is None:
            lane = self._hops.lane(Submitter(self._client._poller, run_id))
            self._lanes[run_id] = lane
        return await asyncio.wrap_future(lane.put(kind, body))

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._hops.call(function, *args, **kwargs)

    async def close(self) -> None:
        """Close the connections; runs on the server go on."""
        self._client.close()
        self._hops.close()

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
