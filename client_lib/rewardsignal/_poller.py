"""Waiting for many futures over few connections: the client's background threads.

A thread polls for all waited-for futures of one run by one held request, `GET /futures?ids=…`, and
wakes who waits for those that have ended: threads, event loops and callbacks alike, so that one future
serves all of them. Threads begin when somebody waits and end when nobody does.
While the client reads one result after the other, a poll also asks for a few of the futures that
follow, twice as many each time they all had ended: a client slower than its worker makes few requests.
With many operations in flight a poll is held until an eighth of them have ended: the worker stays
busy all the same, and the server answers few requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewardsignal._exceptions import (
    NotFoundError,
    SignalAPIError,
    SignalConnectionError,
    SignalTimeoutError,
)
from rewardsignal._schemas import MAX_FUTURE_IDS
from rewardsignal._transport import CLOSED, Transport

if TYPE_CHECKING:
    from rewardsignal._futures import APIFuture

log = logging.getLogger(__name__)

# The last word on a future with its request id, or why it could not be read.
Ended = tuple[Mapping[str, Any], str | None] | Exception
# Called with None when a future has ended, or with why that cannot be known.
OnEnd = Callable[[Exception | None], None]

HELD_S = 25.0
# With every thread in use, newcomers wait for the end of a poll: hold those for less.
CROWDED_HELD_S = 1.0
MAX_THREADS = 8
IDLE_S = 5.0
MAX_AHEAD = 64
# Of so many operations in flight a poll waits for one, at most for so many at once.
DEEP = 8
# An answer that comes this soon was there before it was asked for.
AT_ONCE_S = 0.02
MAX_TOGETHER = 16
GATHERED_S = 0.01
# Servers and proxies take request lines of 8 KB.
MAX_QUERY = 7000


class _Together(list["APIFuture[Any]"]):
    """Futures whose poll ends when all of them have ended."""


class Poller:
    """Waits for the futures of one client."""

    def __init__(self, transport: Transport, *, in_loops: bool = False) -> None:
        """Starts nothing. `in_loops`: the client is used in event loops, which must not be blocked."""
        self.transport, self.in_loops = transport, in_loops
        self._changed = threading.Condition()
        self._waiters: dict[APIFuture[Any], int] = {}
        self._taken: set[APIFuture[Any]] = set()
        self._errors: dict[APIFuture[Any], Exception] = {}
        self._watchers: dict[APIFuture[Any], list[OnEnd]] = {}
        self._threads = self._idle = 0
        self._ahead = 4
        # The last seq that is known to have ended, by run: what is before it is there to be read.
        self._ended: dict[str, int] = {}
        # After a poll that waited for several comes one for all that have ended since.
        self._sweep = False
        self._closed = False

    def wait(self, futures: Sequence[APIFuture[Any]], timeout: float | None) -> None:
        """Return when all have ended. Raises SignalTimeoutError, or what a poll failed with."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._enter(futures)
            try:
                for future in futures:
                    self._wait_for(future, deadline)
            finally:
                self._leave(futures)

    def watch(self, future: APIFuture[Any], on_end: OnEnd) -> None:
        """Call `on_end` once, from a thread of the poller or, if that is known already, from this one."""
        with self._changed:
            if not (known := future.settled or self._closed):
                self._watchers.setdefault(future, []).append(on_end)
                self._enter([future])
        if known:
            on_end(None if future.settled else SignalConnectionError(CLOSED))

    def unwatch(self, future: APIFuture[Any], on_end: OnEnd) -> None:
        """Undo `watch`, if it has not been called yet."""
        with self._changed:
            if on_end in self._watchers.get(future, ()):
                self._watchers[future].remove(on_end)
                if not self._watchers[future]:
                    del self._watchers[future]
                self._leave([future])

    def close(self) -> None:
        """Wake everybody: who still waits gets a SignalConnectionError."""
        with self._changed:
            self._closed = True
            told = self._told(list(self._watchers), SignalConnectionError(CLOSED))
            self._changed.notify_all()
        _tell(told)

    def _enter(self, futures: Sequence[APIFuture[Any]]) -> None:
        for future in futures:
            self._waiters[future] = self._waiters.get(future, 0) + 1
        self._want_thread(futures)
        self._changed.notify_all()

    def _told(
        self, futures: Sequence[APIFuture[Any]], error: Exception | None = None
    ) -> list[tuple[OnEnd, Exception | None]]:
        """Those who watch `futures`, and what they are to hear; nobody watches them afterwards."""
        told: list[tuple[OnEnd, Exception | None]] = []
        for future in futures:
            for on_end in self._watchers.pop(future, ()):
                told.append((on_end, error))
                self._leave([future])
        return told

    def _wait_for(self, future: APIFuture[Any], deadline: float | None) -> None:
        while not future.settled:
            if error := self._errors.pop(future, None):
                # Others who wait for it may have it polled for again.
                self._changed.notify_all()
                raise error
            if self._closed:
                raise SignalConnectionError(CLOSED)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                message = f"{future.future_id} has not ended in time; it can be waited for again."
                raise SignalTimeoutError(message)
            self._changed.wait(left)

    def _leave(self, futures: Sequence[APIFuture[Any]]) -> None:
        for future in futures:
            self._waiters[future] -= 1
            if not self._waiters[future]:
                del self._waiters[future]
                self._errors.pop(future, None)

    def _want_thread(self, futures: Sequence[APIFuture[Any]]) -> None:
        """A thread for `futures`, if there can be another and one of them may be polled for."""
        if self._idle or self._threads >= MAX_THREADS or not any(self._free(futures)):
            return
        self._threads += 1
        threading.Thread(target=self._run, name="rewardsignal-poller", daemon=True).start()

    def _free(self, futures: Iterable[APIFuture[Any]]) -> Iterator[APIFuture[Any]]:
        """Those of `futures` that no poll under way stands for.

        Operations of a run end in order: while an earlier one is polled for, a later one has time.
        """
        earliest: dict[str, int] = {}
        for future in self._taken:
            if future.seq is not None:
                earliest[future.run_id] = min(future.seq, earliest.get(future.run_id, future.seq))
        for future in futures:
            if future.settled or future in self._taken or future in self._errors:
                continue
            if future.seq is None or future.seq < earliest.get(future.run_id, future.seq + 1):
                yield future

    def _run(self) -> None:
        while batch := self._next_batch():
            began = time.monotonic()
            held = HELD_S if self._threads < MAX_THREADS else CROWDED_HELD_S
            try:
                ended = self._read(batch, held)
            except Exception as error:
                ended = dict.fromkeys(batch, error)
            took = time.monotonic() - began
            self._deliver(batch, ended, at_once=took < AT_ONCE_S)
            if not ended and took < 0.05:
                # A server that is about to stop holds no poll.
                time.sleep(0.05)
            elif len(ended) < len(batch) // DEEP:
                # Many end one by one, in no order: the next poll is to find several of them.
                time.sleep(GATHERED_S)

    def _next_batch(self) -> list[APIFuture[Any]]:
        """The next futures to poll for; none when the thread is to end."""
        with self._changed:
            woken = True
            while not self._closed and not (batch := self._take()):
                if not woken:
                    break
                self._idle += 1
                woken = self._changed.wait(IDLE_S)
                self._idle -= 1
            if self._closed or not batch:
                self._threads -= 1
                return []
            self._taken.update(batch)
            self._want_thread(list(self._waiters))
            return batch

    def _take(self) -> list[APIFuture[Any]]:
        free = list(self._free(self._waiters))
        if not free:
            return []
        run_id = free[0].run_id
        if self._threads < MAX_THREADS:
            free = [future for future in free if future.run_id == run_id]
        most = min(MAX_FUTURE_IDS, MAX_QUERY // (len(free[0].future_id) + 2))
        batch = free[:most]
        if len(batch) >= DEEP and batch[0].seq is not None:
            if ended := [future for future in batch if self._is_behind(future)]:
                return ended
            self._sweep = not self._sweep
            if not self._sweep:
                return batch
            return _Together(batch[: min(len(batch) // DEEP, MAX_TOGETHER)])
        if len(batch) == 1 and (together := self._in_flight(batch[0]) // DEEP):
            count = max(min(together, MAX_TOGETHER), min(self._ahead, most - 1))
            return _Together(batch + self._following(batch, count))
        return batch + self._following(batch, min(self._ahead, most - len(batch)))

    def _is_behind(self, future: APIFuture[Any]) -> bool:
        """Whether an operation after it is known to have ended: operations end in their order."""
        return future.seq is not None and future.seq < self._ended.get(future.run_id, 0)

    def _in_flight(self, future: APIFuture[Any]) -> int:
        """Unsettled operations behind `future`; no more are counted than make a difference."""
        count = 0
        while (follower := future.following()) is not None and count < DEEP * MAX_TOGETHER:
            future, count = follower, count + (not follower.settled)
        return count

    def _following(self, batch: list[APIFuture[Any]], count: int) -> list[APIFuture[Any]]:
        """Futures that end after the first of `batch`, so that they do not end the poll early."""
        found: list[APIFuture[Any]] = []
        last = min(batch, key=lambda future: future.seq or 0).following()
        while last is not None and len(found) < count:
            if not (last.settled or last in batch or last in self._taken):
                found.append(last)
            last = last.following()
        return found

    def _read(self, batch: list[APIFuture[Any]], held: float) -> dict[APIFuture[Any], Ended]:
        """What has ended: the futures' final states, or the errors of reading them."""
        if len(batch) == 1:
            return self._read_one(batch[0], held)
        until = "all" if isinstance(batch, _Together) else "any"
        query = {"ids": ",".join(f.future_id for f in batch), "until": until, "wait": held}
        try:
            answer = self.transport.get("/futures", query, held=held)
        except NotFoundError:
            # One id is unknown or has expired: find out which.
            return {future: end for one in batch for future, end in self._try_one(one).items()}
        by_id = {raw["future_id"]: (raw, answer.request_id) for raw in answer.body["data"]}
        pairs = ((future, by_id[future.future_id]) for future in batch)
        return {future: end for future, end in pairs if future.has_ended(end[0])}

    def _read_one(self, future: APIFuture[Any], held: float) -> dict[APIFuture[Any], Ended]:
        query = {"wait": held} if held else None
        answer = self.transport.get(f"/futures/{future.future_id}", query, held=held)
        if not future.has_ended(answer.body):
            return {}
        return {future: (answer.body, answer.request_id)}

    def _try_one(self, future: APIFuture[Any]) -> dict[APIFuture[Any], Ended]:
        try:
            return self._read_one(future, 0.0)
        except SignalAPIError as error:
            return {future: error}

    def _deliver(
        self,
        batch: list[APIFuture[Any]],
        ended: Mapping[APIFuture[Any], Ended],
        at_once: bool,
    ) -> None:
        told: list[tuple[OnEnd, Exception | None]] = []
        with self._changed:
            riders = [future for future in batch if future not in self._waiters]
            for future in batch:
                self._taken.discard(future)
                end = ended.get(future)
                if isinstance(end, Exception):
                    told += self._told([future], end)
                    if future in self._waiters:
                        self._errors[future] = end
                elif end is not None:
                    future.settle(*end)
                    if future.seq is not None:
                        last = self._ended.get(future.run_id, 0)
                        self._ended[future.run_id] = max(last, future.seq)
                    told += self._told([future])
                elif future in self._waiters:
                    # To the end of the queue: with more futures than a poll takes, all get their turn.
                    self._waiters[future] = self._waiters.pop(future)
            self._tune(riders, at_once or not isinstance(batch, _Together))
            self._changed.notify_all()
        _tell(told)

    def _tune(self, riders: list[APIFuture[Any]], ahead_of_us: bool) -> None:
        """`ahead_of_us`: what has ended was not waited for."""
        if ahead_of_us and riders and all(future.settled for future in riders):
            self._ahead = min(MAX_AHEAD, 2 * self._ahead)
        elif not ahead_of_us or not any(future.settled for future in riders):
            self._ahead = max(1, self._ahead // 2)


def _tell(told: Sequence[tuple[OnEnd, Exception | None]]) -> None:
    for on_end, error in told:
        try:
            on_end(error)
        except Exception:
            log.exception("A callback of a future failed.")
