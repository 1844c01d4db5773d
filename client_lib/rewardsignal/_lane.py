"""The lane of a run in an event loop: operations get their places in the order of the calls.

A call puts its operation into the lane and returns at once. A thread sends what the lane holds, one request
at a time; what has gathered behind a request under way goes together in the next one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import Any

from rewardsignal._exceptions import (
    NotFoundError,
    PayloadTooLargeError,
    SignalConnectionError,
    ValidationError,
)
from rewardsignal._futures import APIFuture
from rewardsignal._submit import Held, Submitter

# The operation with what is to be sent of it, and who waits for its place.
Waiting = tuple[APIFuture[Any], list[Held], "Future[APIFuture[Any]]"]
MOST = 64
# What can be the fault of a neighbour in the same request, which then did nothing at all.
_SHARED = (ValidationError, PayloadTooLargeError, NotFoundError)


class Lane:
    """Operations on their way to one run."""

    def __init__(self, submitter: Submitter, executor: Executor) -> None:
        """Sends by a thread of `executor`, one at a time."""
        self._submitter, self._executor = submitter, executor
        self._lock = threading.Lock()
        self._queue: deque[Waiting] = deque()
        # The place of the newest operation: once it is known, all before it have theirs.
        self.last: Future[APIFuture[Any]] | None = None
        self._sending = False

    def put(self, kind: str, body: Mapping[str, Any]) -> Future[APIFuture[Any]]:
        """Queue an operation; the answer is its future, once it has its place."""
        future, held = self._submitter.hold(kind, body)
        placed: Future[APIFuture[Any]] = Future()
        with self._lock:
            self._queue.append((future, held, placed))
            self.last = placed
            begin, self._sending = not self._sending, True
        if begin:
            try:
                self._executor.submit(self._drain)
            except RuntimeError:
                self._give_up()
        return placed

    def _drain(self) -> None:
        while waiting := self._next():
            self._send(waiting)

    def _next(self) -> list[Waiting]:
        with self._lock:
            taken = [self._queue.popleft() for _ in range(min(MOST, len(self._queue)))]
            self._sending = bool(taken)
            return taken

    def _send(self, waiting: list[Waiting]) -> None:
        try:
            self._submitter.send([one for _, held, _ in waiting for one in held])
        except _SHARED:
            self._send_apart(waiting)
        except BaseException as error:
            _refuse(waiting, error)
        else:
            _place(waiting)

    def _send_apart(self, waiting: list[Waiting]) -> None:
        """Each by itself, since one of them keeps the others out; those that got a place have it."""
        for one in waiting:
            try:
                if not one[0].accepted:
                    self._submitter.send(_again(one[1]))
            except BaseException as error:
                _refuse([one], error)
            else:
                _place([one])

    def _give_up(self) -> None:
        """The client is closed."""
        with self._lock:
            waiting, self._sending = list(self._queue), False
            self._queue.clear()
        _refuse(waiting, SignalConnectionError("This client is closed."))


def _again(held: list[Held]) -> list[Held]:
    return [one for one in held if not one[0].accepted]


def _place(waiting: list[Waiting]) -> None:
    for future, _, placed in waiting:
        if placed.set_running_or_notify_cancel():
            placed.set_result(future)


def _refuse(waiting: list[Waiting], error: BaseException) -> None:
    for future, held, placed in waiting:
        if future.accepted:
            _place([(future, held, placed)])
        elif placed.set_running_or_notify_cancel():
            placed.set_exception(error)
