"""The lane of a run in an event loop: operations get their places in the order of the calls.

A call puts its operation into the lane and returns at once. A thread sends what the lane holds, one request
at a time; what has gathered behind a request under way goes together in the next one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from rewardsignal._exceptions import (
    NotFoundError,
    PayloadTooLargeError,
    SignalConnectionError,
    ValidationError,
)
from rewardsignal._futures import APIFuture
from rewardsignal._split import SplitFuture
from rewardsignal._submit import Held, Submitter, why
from rewardsignal._transport import CLOSED

MOST = 64
# What can be the fault of a neighbour in the same request, which then did nothing at all.
_SHARED = (ValidationError, PayloadTooLargeError, NotFoundError)


@dataclass(slots=True)
class _Waiting:
    """An operation, or several that stay together, and who waits for their places.

    Nothing to be sent is a mark: it is placed once all before it are.
    """

    future: APIFuture[Any] | None
    held: Sequence[Held]
    placed: Future[Any] = field(default_factory=Future)


class Lane:
    """Operations on their way to one run."""

    def __init__(self, submitter: Submitter, executor: Executor) -> None:
        """Sends by a thread of `executor`, one at a time."""
        self.submitter, self._executor = submitter, executor
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._sending = False

    def put(self, kind: str, body: Mapping[str, Any]) -> Future[APIFuture[Any]]:
        """Queue an operation; the answer is its future, once it has its place.

        Cancelling the answer takes back an operation that is not on its way yet.
        """
        waiting = _Waiting(*self.submitter.hold(kind, body))
        self._put([waiting])
        return waiting.placed

    def put_together(self, held: Sequence[Held]) -> Future[Any]:
        """Queue operations whose futures somebody has already; all of them are taken, or none."""
        waiting = _Waiting(None, held)
        self._put([waiting])
        return waiting.placed

    def flushed(self) -> Future[None] | None:
        """What ends once everything queued so far has its place or was refused; None if all has."""
        with self._lock:
            if not self._sending:
                return None
            mark = _Waiting(None, [])
            self._queue.append(mark)
        return mark.placed

    def _put(self, waiting: Sequence[_Waiting]) -> None:
        with self._lock:
            self._queue.extend(waiting)
            begin, self._sending = not self._sending, True
        if begin:
            try:
                self._executor.submit(self._drain)
            except RuntimeError:
                self._give_up()

    def _drain(self) -> None:
        while waiting := self._next():
            # From here on nobody can take them back.
            self._send([one for one in waiting if one.placed.set_running_or_notify_cancel()])

    def _next(self) -> list[_Waiting]:
        with self._lock:
            taken = [self._queue.popleft() for _ in range(min(MOST, len(self._queue)))]
            self._sending = bool(taken)
            return taken

    def _send(self, waiting: list[_Waiting]) -> None:
        try:
            self.submitter.post([held for one in waiting for held in one.held])
        except _SHARED as error:
            if len(waiting) > 1:
                self._send_apart(waiting)
            else:
                _refuse(waiting, error)
        except BaseException as error:
            _refuse(waiting, error)
        else:
            _place(waiting)

    def _send_apart(self, waiting: list[_Waiting]) -> None:
        """Each by itself, since one of them keeps the others out; those that got a place have it."""
        for one in waiting:
            try:
                self.submitter.post([pair for pair in one.held if not pair[0].accepted])
            except BaseException as error:
                _refuse([one], error)
            else:
                _place([one])

    def _give_up(self) -> None:
        """The client is closed."""
        with self._lock:
            waiting, self._sending = list(self._queue), False
            self._queue.clear()
        error = SignalConnectionError(CLOSED)
        _refuse([one for one in waiting if one.placed.set_running_or_notify_cancel()], error)


def _place(waiting: Iterable[_Waiting]) -> None:
    for one in waiting:
        one.placed.set_result(one.future)


def _refuse(waiting: Iterable[_Waiting], error: BaseException) -> None:
    for one in waiting:
        refused = [future for future, _ in one.held if not future.accepted]
        for future in refused:
            future.refuse(why(error))
        if refused:
            if isinstance(one.future, SplitFuture) and not isinstance(error, SignalConnectionError):
                one.future.take_back()
            one.placed.set_exception(error)
        else:
            _place([one])
