"""Several futures at once: all of them, the first of them, one after the other as they end."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, TypeVar

from rewardsignal._exceptions import SignalTimeoutError
from rewardsignal._futures import APIFuture
from rewardsignal._poller import Poller
from rewardsignal._records import Record

T = TypeVar("T", bound=Record)
V = TypeVar("V")


class Waited(list[V]):
    """What was waited for: a list, which may also be awaited.

    In an event loop, a group of an AsyncSignalClient's futures does not block it: the list is filled once
    it has been awaited.
    """

    _waiting: asyncio.Future[list[V]] | None = None

    def __await__(self) -> Generator[Any, None, list[V]]:
        if self._waiting is not None:
            self[:] = yield from self._waiting.__await__()
            self._waiting = None
        return list(self)


class FutureGroup(Generic[T]):
    """Futures that are waited for together, in the order in which they were added.

    The methods block, as those of a future do. With futures of an AsyncSignalClient, inside its event
    loop, they are to be awaited instead: `results = await group.wait_all()`.
    """

    def __init__(self, futures: Iterable[APIFuture[T]] = ()) -> None:
        """`futures` may be of several runs and clients."""
        self._futures = list(futures)

    def add(self, future: APIFuture[T]) -> APIFuture[T]:
        """Add a future; returns it."""
        self._futures.append(future)
        return future

    def wait_all(self, timeout: float | None = None) -> Waited[T]:
        """The results in the order of the group, once all have ended, at most after `timeout` seconds.

        Raises the first error there is, or SignalTimeoutError.
        """
        if not self._in_loop():
            return Waited(wait_all(self._futures, timeout))
        return self._awaitable(self._all(timeout))

    def wait_any(self, timeout: float | None = None) -> Waited[APIFuture[T]]:
        """Those that have ended, once at least one has. Raises SignalTimeoutError."""
        if not self._in_loop():
            next(_as_completed(self._futures, timeout), None)
            return Waited(future for future in self._futures if future.settled)
        return self._awaitable(self._any(timeout))

    def as_completed(self, timeout: float | None = None) -> Completed[T]:
        """The futures in the order in which they end: `for` or `async for`."""
        return Completed(self._futures, timeout)

    def done(self) -> bool:
        """Whether all have ended, as far as is known here; asks nobody."""
        return all(future.settled for future in self._futures)

    def cancel(self) -> int:
        """Cancel what can still be cancelled, the last first; returns how many."""
        return sum(future.cancel() for future in reversed(self._futures) if not future.settled)

    def __len__(self) -> int:
        return len(self._futures)

    def __iter__(self) -> Iterator[APIFuture[T]]:
        return iter(self._futures)

    def __repr__(self) -> str:
        ended = sum(future.settled for future in self._futures)
        return f"<FutureGroup of {len(self)}, {ended} known to have ended>"

    def _in_loop(self) -> bool:
        if not any(future.poller.in_loops for future in self._futures):
            return False
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    def _awaitable(self, waiting: Any) -> Waited[Any]:
        waited: Waited[Any] = Waited()
        waited._waiting = asyncio.ensure_future(waiting)
        return waited

    async def _all(self, timeout: float | None) -> list[T]:
        async for _ in self.as_completed(timeout):
            pass
        return [future.result() for future in self._futures]

    async def _any(self, timeout: float | None) -> list[APIFuture[T]]:
        async with aclosing(aiter(self.as_completed(timeout))) as completed:
            await anext(completed, None)
        return [future for future in self._futures if future.settled]


class Completed(Generic[T]):
    """Futures in the order in which they end."""

    def __init__(self, futures: Iterable[APIFuture[T]], timeout: float | None) -> None:
        """`timeout` in seconds bounds the whole iteration."""
        self._futures, self._timeout = list(futures), timeout

    def __iter__(self) -> Iterator[APIFuture[T]]:
        return _as_completed(self._futures, self._timeout)

    async def __aiter__(self) -> AsyncGenerator[APIFuture[T]]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[End[T]] = asyncio.Queue()
        await asyncio.to_thread(_send, self._futures)

        def put(future: APIFuture[T], error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.put_nowait, (future, error))

        deadline = None if self._timeout is None else loop.time() + self._timeout
        with _Watching(self._futures, put):
            for _ in self._futures:
                try:
                    async with asyncio.timeout_at(deadline):
                        end = await ended.get()
                except TimeoutError:
                    raise _late(self._futures) from None
                yield _known(end)


End = tuple[APIFuture[T], Exception | None]


def wait_all(futures: Iterable[APIFuture[T]], timeout: float | None = None) -> list[T]:
    """The results of all futures, in their order, by as few requests as possible.

    Waits until all have ended, at most `timeout` seconds, then raises the first error there is.
    """
    waited = list(futures)
    by_client: dict[Poller, list[APIFuture[Any]]] = {}
    for future in waited:
        if not future.settled:
            future.future_id  # noqa: B018 - sends what a pipeline holds back
            by_client.setdefault(future.poller, []).extend(future.parts())
    deadline = None if timeout is None else time.monotonic() + timeout
    for poller, mine in by_client.items():
        # A run's operations end in order: its last one is worth one held poll, the rest is reading.
        poller.wait(list({future.run_id: future for future in mine}.values()), _left(deadline))
        poller.wait(mine, _left(deadline))
    return [future.result() for future in waited]


def as_completed(
    futures: Iterable[APIFuture[T]], timeout: float | None = None
) -> Iterator[APIFuture[T]]:
    """The futures in the order in which they end. Raises SignalTimeoutError after `timeout` seconds."""
    return _as_completed(list(futures), timeout)


class _Watching(Generic[T]):
    """Has `put` called for each future that ends, until the block ends."""

    def __init__(self, futures: list[APIFuture[T]], put: Any) -> None:
        self._futures, self._put = futures, put
        self._leave: list[Any] = []

    def __enter__(self) -> None:
        for future in self._futures:
            self._leave.append(future.when_ended(partial(self._put, future)))

    def __exit__(self, *_: object) -> None:
        for leave in self._leave:
            leave()


def _as_completed(futures: list[APIFuture[T]], timeout: float | None) -> Iterator[APIFuture[T]]:
    deadline = None if timeout is None else time.monotonic() + timeout
    ended: queue.SimpleQueue[End[T]] = queue.SimpleQueue()
    _send(futures)
    with _Watching(futures, lambda future, error: ended.put((future, error))):
        for _ in futures:
            left = _left(deadline)
            try:
                yield _known(ended.get(timeout=None if left is None else max(0.0, left)))
            except queue.Empty:
                raise _late(futures) from None


def _send(futures: Iterable[APIFuture[Any]]) -> None:
    for future in futures:
        future.future_id  # noqa: B018 - sends what a pipeline holds back


def _known(end: End[T]) -> APIFuture[T]:
    future, error = end
    if error is not None:
        raise error
    return future


def _late(futures: Iterable[APIFuture[Any]]) -> SignalTimeoutError:
    left = sum(not future.settled for future in futures)
    return SignalTimeoutError(
        f"{left} futures have not ended in time; they can be waited for again."
    )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
