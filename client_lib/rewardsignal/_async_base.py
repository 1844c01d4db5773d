"""What the asynchronous clients share: the threads that make the calls of the one core.

The core is that of the synchronous client: it keeps the order of a run, repeats what may be repeated, and
polls for thousands of futures over a few connections. An event loop hands calls to its threads, so it never
blocks, and nothing is bound to one loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack

from rewardsignal._exceptions import SignalConnectionError
from rewardsignal._futures import APIFuture
from rewardsignal._lane import Lane
from rewardsignal._operations import Prompts
from rewardsignal._pipeline import Pipeline
from rewardsignal._run import SignalRun
from rewardsignal._schemas import Run, SampleOptions
from rewardsignal._stream import SampleStream, StreamToken
from rewardsignal._tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS = 32


class Hops:
    """The threads of one client."""

    def __init__(self) -> None:
        """Starts none."""
        self.executor = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="rewardsignal")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)` in a thread. Raises SignalConnectionError once closed."""
        loop = asyncio.get_running_loop()
        try:
            waiting = loop.run_in_executor(
                self.executor, functools.partial(function, *args, **kwargs)
            )
        except RuntimeError as error:
            raise SignalConnectionError("This client is closed.") from error
        return await waiting

    async def each(self, items: Iterable[T]) -> AsyncGenerator[T]:
        """The items of an iteration whose steps may block."""
        iterator = iter(items)
        try:
            while (item := await self.call(next, iterator, _END)) is not _END:
                yield item
        finally:
            if isinstance(iterator, Iterator) and hasattr(iterator, "close"):
                await self.call(iterator.close)


_END: Any = object()


class AsyncRunBase:
    """What of an AsyncSignalRun is not a call of SignalRun in a thread."""

    def __init__(self, run: SignalRun, hops: Hops) -> None:
        """Made by AsyncSignalClient."""
        self._run, self._hops = run, hops
        self._lane = Lane(run._submitter, hops.executor)

    @property
    def run_id(self) -> str:
        """The run's name on the server."""
        return self._run.run_id

    @property
    def info(self) -> Run:
        """The run as the server last showed it."""
        return self._run.info

    def _put(self, kind: str, body: Mapping[str, Any]) -> asyncio.Future[APIFuture[Any]]:
        return asyncio.wrap_future(self._lane.put(kind, body))

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call in a thread, after everything that was submitted before it has its place."""
        if (last := self._lane.last) is not None and not last.done():
            loop = asyncio.get_running_loop()
            sent = asyncio.Event()
            last.add_done_callback(lambda _: loop.call_soon_threadsafe(sent.set))
            await sent.wait()
        return await self._hops.call(function, *args, **kwargs)

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer on this machine, from the files that the server serves; fetched once.

        Needs the extra `tokenizer`, and neither torch nor transformers.
        """
        return await self._hops.call(lambda: self._run.tokenizer)

    def submit(self, operations: Iterable[Any]) -> asyncio.Future[list[APIFuture[Any]]]:
        """Submit several operations in their order: objects of `kind` and the fields of that call."""
        return asyncio.gather(*(self._put(one["kind"], _without_kind(one)) for one in operations))

    def pipeline(self, max_operations: int = 64) -> AsyncPipeline:
        """Collects operations and submits them together: `async with run.pipeline() as pipe: …`."""
        return AsyncPipeline(self._run.pipeline(max_operations), self._hops)

    async def stream_sample(
        self, prompts: Prompts, **options: Unpack[SampleOptions]
    ) -> AsyncGenerator[StreamToken]:
        """Sample, and get each token as it comes: `async for token in run.stream_sample("Once"): …`.

        Leaving the iteration before its end cancels the sample.
        """
        stream: SampleStream = await self._call(self._run.stream_sample, prompts, **options)
        try:
            async for token in self._hops.each(stream):
                yield token
        finally:
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._call(self._run.__exit__, kind, error, trace)

    def __repr__(self) -> str:
        return f"<Async{repr(self._run)[1:]}"


class AsyncPipeline:
    """A pipeline of an AsyncSignalRun; its futures are awaited after the block."""

    def __init__(self, pipeline: Pipeline, hops: Hops) -> None:
        """Made by `run.pipeline()`."""
        self._pipeline, self._hops = pipeline, hops

    async def __aenter__(self) -> Pipeline:
        return self._pipeline

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._hops.call(self._pipeline.__exit__, kind, error, trace)


def _without_kind(operation: Any) -> dict[str, Any]:
    return {name: value for name, value in operation.items() if name != "kind"}
