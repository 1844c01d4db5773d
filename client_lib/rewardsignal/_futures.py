"""Futures: an operation's place in the queue and, once it has ended, its result or its error."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
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

    It may be waited for as often as one likes, from any thread, also after a wait ran out of time. One
    that a pipeline holds back is sent by the first call that needs the server's word on it.
    """

    def __init__(
        self, poller: Poller, run_id: str, kind: str, send: Callable[[], None] | None = None
    ) -> None:
        """Made by the calls of `SignalRun`; `send` flushes the pipeline that holds it."""
        self.run_id = run_id
        self.kind = kind
        self.seq: int | None = None
        self._poller = poller
        self._send = send
        self._id: str | None = None
        self._refused: Exception | None = None
        self._final: tuple[Mapping[str, Any], str | None] | None = None
        self._next: weakref.ref[APIFuture[Any]] | None = None

    def result(self, timeout: float | None = None) -> T:
        """The operation's result, waited for at most `timeout` seconds.

        Raises OperationFailedError when it failed or was cancelled, SignalTimeoutError when it has not
        ended in time.
        """
        if not self.settled:
            self._sent_id()
            self._poller.wait([self], timeout)
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
            self._poller.wait([self], timeout)
        try:
            self.result()
        except SignalAPIError as error:
            return error
        return None

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

    def bind(self, raw: Mapping[str, Any], request_id: str | None = None) -> None:
        """Take the server's first word on it."""
        self._id, self.seq = raw["future_id"], raw["seq"]
        self._send = None
        if self.has_ended(raw):
            self.settle(raw, request_id)

    def refuse(self, error: Exception) -> None:
        """It was not accepted, and every use of it says so."""
        self._send, self._refused = None, error

    def settle(self, raw: Mapping[str, Any], request_id: str | None) -> None:
        """Take the server's last word on it."""
        self.seq = raw["seq"]
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


def wait_all(futures: Iterable[APIFuture[T]], timeout: float | None = None) -> list[T]:
    """The results of all futures, in their order, by as few requests as possible.

    Waits until all have ended, at most `timeout` seconds, then raises the first error there is.
    """
    waited = list(futures)
    by_client: dict[Poller, list[APIFuture[T]]] = {}
    for future in waited:
        if not future.settled:
            future.future_id  # noqa: B018 - sends what a pipeline holds back
            by_client.setdefault(future._poller, []).append(future)
    deadline = None if timeout is None else time.monotonic() + timeout
    for poller, mine in by_client.items():
        # A run's operations end in order: its last one is worth one held poll, the rest is reading.
        poller.wait(list({future.run_id: future for future in mine}.values()), _left(deadline))
        poller.wait(mine, _left(deadline))
    return [future.result() for future in waited]


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
