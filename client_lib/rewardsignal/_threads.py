"""Threads that make blocking calls for event loops and never hold up the end of the process.

Those of `concurrent.futures` are joined when the interpreter exits: a program that was interrupted in a held
request would stand there until the server answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

IDLE_S = 5.0


class DaemonThreads(Executor):
    """At most so many threads, which begin when there is a call for them and end when there is none."""

    def __init__(self, most: int, name: str) -> None:
        """Starts none."""
        self._most, self._name = most, name
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`function(*args, **kwargs)` in a thread. Raises RuntimeError once closed."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("These threads are closed.")
            self._calls.append((future, partial(function, *args, **kwargs)))
            if len(self._calls) > self._idle and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those that are queued are still made. Waits for nobody."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while self._make_next_call():
            pass

    def _make_next_call(self) -> bool:
        """In a function of its own, so that an idle thread keeps no result alive."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._calls or self._closed, IDLE_S)
            self._idle -= 1
            if not self._calls:
                self._threads -= 1
                return False
            future, call = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        return True
