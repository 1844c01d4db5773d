"""What a web process takes on at once, so that a burst of large requests costs neither memory nor latency.

A body's place in memory is taken before it is read; what does not fit waits in the client's connection. One
request's JSON holds the interpreter for as long as it is parsed and checked, so requests with bodies are
worked on one at a time, in the order of arrival, while reads go past them.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from flask import Flask, g

from schemas.errors import SignalError

# Up to this size a body counts for nothing.
SMALL_BYTES = 64 * 1024
BODIES_BYTES = 32 * 1024 * 1024
# More would only share the interpreter: a second one doubles what a read waits for.
TURNS = 1
# At each gate; gunicorn has threads for so many and for everything else besides.
MAX_WAITING = 256
WAIT_S = 25.0


class Gate:
    """A semaphore with weights, first come, first served."""

    def __init__(self, capacity: int, max_waiting: int) -> None:
        """Those inside weigh at most `capacity`, or are one; at most `max_waiting` wait."""
        self.capacity, self._max_waiting = capacity, max_waiting
        self.inside = 0
        self._queue: deque[tuple[int, threading.Event]] = deque()
        self._lock = threading.Lock()

    def enter(self, weight: int, timeout_s: float) -> bool:
        """Whether there was a place within the time; False at once when too many wait already."""
        with self._lock:
            if not self._queue and self._fits(weight):
                self.inside += weight
                return True
            if len(self._queue) >= self._max_waiting:
                return False
            ticket = (weight, threading.Event())
            self._queue.append(ticket)
        if ticket[1].wait(timeout_s):
            return True
        with self._lock:
            if ticket[1].is_set():
                return True
            self._queue.remove(ticket)
            # Those behind may be lighter.
            self._admit()
            return False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def leave(self, weight: int) -> None:
        """Give the place back."""
        with self._lock:
            self.inside -= weight
            self._admit()

    def _fits(self, weight: int) -> bool:
        return self.inside == 0 or self.inside + weight <= self.capacity

    def _admit(self) -> None:
        while self._queue and self._fits(self._queue[0][0]):
            weight, event = self._queue.popleft()
            self.inside += weight
            event.set()


class Admission:
    """The gates of one process, as the current request passes them."""

    def __init__(self, wait_s: float = WAIT_S, polls: int = 0) -> None:
        """`wait_s` bounds a request's wait for both together. Long polls that come with a body need a turn
        before they wait: so many of them may come at once."""
        self._wait_s = wait_s
        self.bodies = Gate(BODIES_BYTES, MAX_WAITING)
        self.turns = Gate(TURNS, MAX_WAITING + polls)

    def take_body(self, size: int) -> None:
        """Before a body of so many bytes is read. Raises SignalError overloaded."""
        if size > SMALL_BYTES:
            self._pass(self.bodies, size)
            g.admitted_body = (self.bodies, size)

    def take_turn(self) -> None:
        """Before a body that has been read is parsed. Raises SignalError overloaded."""
        self._pass(self.turns, 1)
        g.admitted_turn = self.turns

    def _pass(self, gate: Gate, weight: int) -> None:
        until = g.setdefault("admission_until", time.monotonic() + self._wait_s)
        if not gate.enter(weight, max(0.0, until - time.monotonic())):
            raise SignalError("overloaded")


def end_turn() -> None:
    """Before the request waits for anything; without effect when it has no turn."""
    turns: Gate | None = g.pop("admitted_turn", None)
    if turns is not None:
        turns.leave(1)


def end_work() -> None:
    """Once the request only waits for its result, or is over: its turn and its body's place are given back.

    A result may take long, and the body is gone from memory by then.
    """
    end_turn()
    bodies, size = g.pop("admitted_body", (None, 0))
    if bodies is not None:
        bodies.leave(size)


def install(app: Flask) -> None:
    """Gives back at the end of every request what it has taken, however it ends."""

    def end(error: BaseException | None) -> None:
        end_work()

    app.teardown_request(end)
