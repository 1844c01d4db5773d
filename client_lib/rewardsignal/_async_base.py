"""What the asynchronous clients share: the threads that make the calls of the one core.

The core is that of the synchronous client: it keeps the order of a run, repeats what may be repeated, and
polls for thousands of futures over a few connections. An event loop hands calls to its threads, so it never
blocks, and nothing is bound to one loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack
from weakref import WeakValueDictionary

from rewardsignal._exceptions import SignalConnectionError
from rewardsignal._futures import APIFuture
from rewardsignal._lane import Lane
from rewardsignal._operations import Prompts
from rewardsignal._pipeline import Pipeline
from rewardsignal._run import SignalRun
from rewardsignal._schemas import Run, SampleOptions
from rewardsignal._stream import SampleStream, StreamToken
from rewardsignal._submit import Submitter, without_kind
from rewardsignal._threads import DaemonThreads
from rewardsignal._tokenizer import Tokenizer
from rewardsignal._transport import CLOSED

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS = 32


class Hops:
    """The threads of one client."""

    def __init__(self) -> None:
        """Starts none."""
        self._calls = DaemonThreads(MAX_THREADS, "rewardsignal")
        # Lanes have threads of their own: calls that wait for an operation must not keep it from being sent.
        self._sending = DaemonThreads(MAX_THREADS, "rewardsignal-lane")
        self._lock = threading.Lock()
        self._lanes: WeakValueDictionary[str, Lane] = WeakValueDictionary()

    def lane(self, submitter: Submitter) -> Lane:
        """The one lane of a run, however many objects stand for it."""
        with self._lock:
            lane = self._lanes.get(submitter.run_id)
            if lane is None:
                lane = self._lanes[submitter.run_id] = Lane(submitter, self._sending)
            return lane

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`function(*args, **kwargs)` in a thread. Raises SignalConnectionError once closed."""
        try:
            return self._calls.submit(function, *args, **kwargs)
        except RuntimeError as error:
            raise SignalConnectionError(CLOSED) from error

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `submit`, and its result."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    async def each(self, items: Iterable[T]) -> AsyncGenerator[T]:
        """The items of an iteration whose steps may block."""
        iterator, step = iter(items), None
        try:
            step = self.submit(next, iterator, _END)
            while (item := await asyncio.wrap_future(step)) is not _END:
                yield item
                step = self.submit(next, iterator, _END)
        finally:
            close = getattr(iterator, "close", None)
            if step is not None and close is not None:
                # Whoever leaves may leave a step behind that is still under way: its end is waited for.
                step.add_done_callback(lambda _: close())

    def close(self) -> None:
        """Take no more calls; those that are queued find the client closed."""
        self._calls.shutdown(wait=False)
        self._sending.shutdown(wait=False)


_END: Any = object()


class AsyncRunBase:
    """What of an AsyncSignalRun is not a call of SignalRun in a thread."""

    def __init__(self, run: SignalRun, hops: Hops) -> None:
        """Made by AsyncSignalClient."""
        self._run, self._hops = run, hops
        self._lane = hops.lane(run._submitter)

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
        if (sent := self._lane.flushed()) is not None:
            await asyncio.wrap_future(sent)
        return await self._hops.call(function, *args, **kwargs)

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer on this machine, from the files that the server serves; fetched once.

        Needs the extra `tokenizer`, and neither torch nor transformers.
        """
        return await self._hops.call(lambda: self._run.tokenizer)

    def submit(self, operations: Iterable[Any]) -> asyncio.Future[list[APIFuture[Any]]]:
        """Submit several operations in their order: objects of `kind` and the fields of that call."""
        return asyncio.gather(*(self._put(one["kind"], without_kind(one)) for one in operations))

    def pipeline(self, max_operations: int = 64) -> AsyncPipeline:
        """Collects operations and submits them together: `async with run.pipeline() as pipe: …`."""
        return AsyncPipeline(self._lane, max_operations)

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
            stream.hang_up()

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


class LanePipeline(Pipeline):
    """A pipeline in an event loop: what it has collected goes into the lane, so that adding never blocks."""

    def __init__(self, lane: Lane, max_operations: int) -> None:
        """`max_operations` is how many are collected before they are sent."""
        super().__init__(lane.submitter, max_operations)
        self._lane = lane
        self._placed: list[Future[Any]] = []

    def flush(self) -> None:
        """Send what is collected, and wait until all has its place. Raises what the server refused."""
        self._full()
        with self._lock:
            placed, self._placed = self._placed, []
        for one in placed:
            one.result()

    def _full(self) -> None:
        with self._lock:
            held, self._held, self._size = self._held, [], 0
            if held:
                self._placed.append(self._lane.put_together(held))

    def _send_held(self) -> None:
        # What others were refused is theirs to say.
        self._full()
        if (sent := self._lane.flushed()) is not None:
            sent.result()


class AsyncPipeline:
    """A pipeline of an AsyncSignalRun; its futures are awaited after the block."""

    def __init__(self, lane: Lane, max_operations: int) -> None:
        """Made by `run.pipeline()`."""
        self._lane, self._pipeline = lane, LanePipeline(lane, max_operations)

    async def __aenter__(self) -> Pipeline:
        return self._pipeline

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises what the server refused, when the block ends well."""
        await asyncio.to_thread(self._pipeline.__exit__, kind, error, trace)
