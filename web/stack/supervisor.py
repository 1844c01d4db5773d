"""Keeps a set of processes running: starts them, restarts what dies, stops them all at the end.

One loop in one thread: deaths and signals arrive through one queue. Knows nothing of what the processes
are for; `web.stack.stack` does.
"""

from __future__ import annotations

import logging
import queue
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from gpu_pool.process import Process
from gpu_pool.watch import Watcher
from web.stack.children import UNKNOWN, Child, Service, rotate
from web.stack.errors import StackError
from web.stack.folder import Folder

log = logging.getLogger("signal.stack")

POLL_S = 0.05
HOUSEKEEPING_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asked to stop before everything served."""


@dataclass(frozen=True)
class Stop:
    """A signal that asks to stop arrived."""

    number: int


class Supervisor:
    """The processes of one data folder. Use it as a context manager, in the main thread."""

    def __init__(self, folder: Folder, changed: Callable[[], None]) -> None:
        """`changed` is called after every start, so that a record of the processes can be kept."""
        self.children: dict[str, Child] = {}
        self._folder = folder
        self._changed = changed
        self._events: queue.SimpleQueue[Process | Stop] = queue.SimpleQueue()
        self._watcher = Watcher(lambda process, _status: self._events.put(process))
        self._stops = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals that ask to stop, while it is open."""

        def note(number: int, _frame: FrameType | None) -> None:
            # Safe inside a handler: SimpleQueue's put is reentrant.
            self._events.put(Stop(number))

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        self._watcher.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._watcher.close()

    def start(self, service: Service) -> Child:
        """Starts a service under its name."""
        child = Child(service, self._folder.working, self._folder.log(service.name))
        self.children[service.name] = child
        self._launch(child)
        return child

    def adopt(self, service: Service, process: Process, restarts: int) -> Child:
        """Takes over a living process of a supervisor that is gone."""
        child = Child(service, self._folder.working, self._folder.log(service.name))
        child.adopt(process, restarts)
        self.children[service.name] = child
        self._watcher.watch(process)
        log.info("adopted %s, pid %d", service.name, process.pid)
        self._changed()
        return child

    def run_to_end(self, service: Service, timeout_s: float) -> None:
        """Runs a service that ends by itself. Raises StackError with its words when it fails."""
        child = self.start(service)
        deadline = time.monotonic() + timeout_s
        while (code := child.exit_code()) is None:
            self._check(deadline, (child,))
            self._drain(POLL_S)
        del self.children[service.name]
        self._changed()
        if code:
            raise StackError(child.words() or f"{service.name} ended with status {code}")

    def wait_until_serving(self, children: Iterable[Child], timeout_s: float) -> None:
        """Returns when all serve. Raises StackError when one dies or time is over, or Interrupted."""
        waiting = list(children)
        deadline = time.monotonic() + timeout_s
        while True:
            for child in self.children.values():
                if (code := child.exit_code()) is not None:
                    raise StackError(_death(child, code))
            waiting = [child for child in waiting if not child.serves()]
            if not waiting:
                return
            self._check(deadline, waiting)
            self._drain(POLL_S)

    def loop(self) -> None:
        """Restarts what dies, until a signal asks to stop."""
        tidy_at = time.monotonic() + HOUSEKEEPING_S
        while not self._stops:
            self._drain(self._pause(tidy_at))
            for child in self.children.values():
                self._mend(child)
            if time.monotonic() >= tidy_at:
                tidy_at = time.monotonic() + HOUSEKEEPING_S
                for child in self.children.values():
                    rotate(child.log)

    def stop(self, stages: Sequence[Sequence[str]]) -> None:
        """Stops stage after stage; a second signal, or a grace that is over, kills."""
        for stage in stages:
            asked = [self.children[name] for name in stage if name in self.children]
            for child in asked:
                child.ask_to_stop()
            for child in asked:
                self._await_end(child)
        for child in self.children.values():
            child.kill()

    def _await_end(self, child: Child) -> None:
        deadline = time.monotonic() + child.service.grace_s
        while child.exit_code() is None:
            if time.monotonic() >= deadline or self._stops > 1:
                log.warning("%s did not stop in time and is killed", child.service.name)
                break
            self._drain(POLL_S)
        child.kill()
        log.info("stopped %s", child.service.name)

    def _launch(self, child: Child) -> None:
        process = child.start()
        log.info("started %s, pid %d", child.service.name, process.pid)
        self._watcher.watch(process)
        self._changed()

    def _mend(self, child: Child) -> None:
        code = child.exit_code()
        if code is None:
            return
        if child.restart_at is None:
            # What it started in its session must not live on beside its successor's.
            child.kill()
            delay = child.plan_restart()
            log.error("%s; restart in %.1f s", _death(child, code), delay)
        elif time.monotonic() >= child.restart_at:
            try:
                self._launch(child)
            except (OSError, StackError) as error:  # no memory, no process, no port just now
                child.plan_restart()
                log.error("%s could not be started: %s", child.service.name, error)

    def _pause(self, tidy_at: float) -> float:
        due = [child.restart_at for child in self.children.values() if child.restart_at is not None]
        return max(0.0, min([tidy_at, *due]) - time.monotonic())

    def _drain(self, timeout_s: float) -> None:
        """Waits for one event; deaths need no more than the wake, as every child is looked at."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return
        if isinstance(event, Stop):
            log.info("signal %d: stopping", event.number)
            self._stops += 1

    def _check(self, deadline: float, waiting: Iterable[Child]) -> None:
        if self._stops:
            raise Interrupted
        if time.monotonic() >= deadline:
            slow = next(iter(waiting))
            raise StackError(f"{slow.service.name} does not serve in time:\n{slow.words()}")


def _death(child: Child, code: int) -> str:
    if code == UNKNOWN:
        how = "ended"
    else:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    words = child.words()
    return f"{child.service.name} {how}" + (f":\n{words}" if words else "")
