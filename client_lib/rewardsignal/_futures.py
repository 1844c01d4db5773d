"""Futures: an operation's place in the queue and, once it has ended, its result or its error."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from rewardsignal._exceptions import (
    ConflictError,
    NotFoundError,
    SignalAPIError,
    from_failed_future,
)
from rewardsignal._poller import Poller
from rewardsignal._records import Record
from rewardsignal._schemas import RESULTS, Future

T = TypeVar("T", bound=Record)

ENDED = frozenset(("completed", "failed", "cancelled"))


class APIFuture(Generic[T]):
    """One submitted operation.

    It may be waited for as often as one likes, also after a wait ran out of time: by `result` from any
    thread, by `await` in any event loop. One that a pipeline holds back is sent by the first call that
    needs the server's word on it.
    """

    def __init__(
        self, poller: Poller, run_id: str, kind: str, send: Callable[[], None] | None = None
    ) -> None:
        """Made by the calls of `SignalRun`; `send` flushes the pipeline that holds it."""
        self.run_id = run_id
        self.kind = kind
        self._seq: int | None = None
        self._poller = poller
        self._send = send
        self._id: str | None = None
        self._refused: Exception | None = None
        self._final: tuple[Mapping[str, Any], str | None] | None = None
        self._next: weakref.ref[APIFuture[Any]] | None = None
        # Of a part of a larger call: that call's name, and how many of its items come before this part's.
        self.part_of: tuple[object, int] | None = None

    def result(self, timeout: float | None = None) -> T:
        """The operation's result, waited for at most `timeout` seconds.

        Raises OperationFailedError when it failed or was cancelled, SignalTimeoutError when it has not
        ended in time.
        """
        if not self.settled:
            self._sent_id()
            self._poller.wait(self.parts(), timeout)
        return self._outcome()

    def _outcome(self) -> T:
        assert self._final is not None
        raw, request_id = self._final
        if raw["status"] != "completed":
            raise from_failed_future(raw["status"], raw.get("error"), request_id)
        if raw.get("result") is None:
            raise NotFoundError(None, 410, raw.get("error"), request_id=request_id)
        return cast(T, RESULTS.get(self.kind, Record).from_dict(raw["result"]))

    def exception(self, timeout: float | None = None) -> SignalAPIError | None:
        """The error that the operation ended in, or None; waits as `result` does."""
        if not self.settled:
            self._sent_id()
            self._poller.wait(self.parts(), timeout)
        try:
            self._outcome()
        except SignalAPIError as error:
            return error
        return None

    def add_done_callback(self, callback: Callable[[APIFuture[T]], object]) -> None:
        """Call `callback(self)` once it has ended, from a background thread, or now if it has.

        It is called too when the end cannot be known (the client was closed, the server has been away
        for longer than `retry_for`): `result()` then raises why. Keep it short: it holds up others.
        """

        def on_end(error: Exception | None) -> None:
            callback(self)

        self.when_ended(on_end)

    def __await__(self) -> Generator[Any, None, T]:
        """Its result, without blocking the event loop; raises what `result` raises."""
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        if not self.accepted:
            await asyncio.to_thread(self._sent_id)
        await self.ended()
        return self._outcome()

    def status(self) -> Future:
        """Where it stands: status, queue position, times; asks the server until it has ended."""
        if self._final is None:
            answer = self._poller.transport.get(f"/futures/{self._sent_id()}")
            if not self.has_ended(answer.body):
                return Future.from_dict(answer.body)
            self.settle(answer.body, answer.request_id)
        assert self._final is not None
        return Future.from_dict(self._final[0])

    def done(self) -> bool:
        """Whether it has ended, well or not; asks the server."""
        return self.settled or self.status().status in ENDED

    def cancel(self) -> bool:
        """Skip it in the queue, or stop a running sample; False when it is too late for that."""
        try:
            self._poller.transport.delete(f"/futures/{self._sent_id()}")
        except ConflictError:
            return False
        return True

    @property
    def seq(self) -> int | None:
        """Its place among the run's operations; None of what has none."""
        return self._seq

    @property
    def future_id(self) -> str:
        """The server's name for it; `client.future(future_id)` finds it again."""
        return self._sent_id()

    @property
    def accepted(self) -> bool:
        """Whether the server has given it a place."""
        return self._id is not None

    @property
    def settled(self) -> bool:
        """Whether its end is known here."""
        return self._final is not None

    def __repr__(self) -> str:
        state = self._final[0]["status"] if self._final else "unknown" if self._id else "not sent"
        return f"<APIFuture {self.kind} seq={self.seq} {state} {self._id or ''}>"

    # For the rest of the package:

    @property
    def poller(self) -> Poller:
        """What waits for it: futures of one client are waited for together."""
        return self._poller

    def parts(self) -> Sequence[APIFuture[Any]]:
        """The operations behind it."""
        return [self]

    def when_ended(self, on_end: Callable[[Exception | None], None]) -> Callable[[], None]:
        """Call `on_end` once, with None or with why the end cannot be known; returns what undoes that."""
        self._sent_id()
        self._poller.watch(self, on_end)
        return lambda: self._poller.unwatch(self, on_end)

    async def ended(self) -> None:
        """Return when it has ended. Raises what a poll for it failed with."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake(error: Exception | None) -> None:
            if waiter.done():
                return
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

        def on_end(error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake, error)

        leave = self.when_ended(on_end)
        try:
            await waiter
        finally:
            leave()

    def bind(self, raw: Mapping[str, Any], request_id: str | None = None) -> None:
        """Take the server's first word on it."""
        self._id, self._seq = raw["future_id"], raw["seq"]
        self._send = self._refused = None
        if self.has_ended(raw):
            self.settle(raw, request_id)

    def refuse(self, error: Exception) -> None:
        """It was not accepted, and every use of it says so."""
        self._send, self._refused = None, error

    def settle(self, raw: Mapping[str, Any], request_id: str | None) -> None:
        """Take the server's last word on it."""
        self._seq = raw["seq"]
        self._final = (raw, request_id)

    def follow(self, other: APIFuture[Any]) -> None:
        """Say that `other` was submitted next on the same run."""
        self._next = weakref.ref(other)

    def following(self) -> APIFuture[Any] | None:
        """The future submitted next on the same run, if anybody still has it."""
        return self._next() if self._next else None

    @staticmethod
    def has_ended(raw: Mapping[str, Any]) -> bool:
        """Whether a future's JSON object is final."""
        return raw["status"] in ENDED

    def _sent_id(self) -> str:
        if self._id is None and self._send is not None:
            self._send()
        if self._refused is not None:
            raise self._refused
        assert self._id is not None
        return self._id
