"""Tells at once when a process ends: one thread that waits on pidfds and does nothing else.

No Redis and no SQL here, so that a lost connection cannot delay the news of a death.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable
from threading import Lock, Thread

from gpu_pool.process import Process

log = logging.getLogger(__name__)


class Watcher:
    """Calls `on_exit(process, status)` in its own thread, once for each watched process that ends.

    The status is negative for a signal, and None where nobody can tell it any more.
    """

    def __init__(self, on_exit: Callable[[Process, int | None], None]) -> None:
        """The callback must be quick: it delays the news of the next death."""
        self._on_exit = on_exit
        self._lock = Lock()
        self._watched: dict[int, Process] = {}
        self._poll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._stop, select.EPOLLIN)
        self._thread = Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the thread; processes that are still watched are forgotten."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for descriptor in (self._stop, *self._watched):
            os.close(descriptor)
        self._poll.close()

    def watch(self, process: Process) -> None:
        """Begins to watch; a process that has ended already is reported like any other."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._report(process, None)
            return
        if not process.exists():  # the pid belongs to another process by now
            os.close(descriptor)
            self._report(process, None)
            return
        with self._lock:
            self._watched[descriptor] = process
            self._poll.register(descriptor, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._stop:
                    return
                self._ended(descriptor)

    def _ended(self, descriptor: int) -> None:
        with self._lock:
            process = self._watched.pop(descriptor)
            self._poll.unregister(descriptor)
        # Before anything else: its parent may read the status at any moment, and then it is gone.
        status = process.exit_status(descriptor)
        os.close(descriptor)
        self._report(process, status)

    def _report(self, process: Process, status: int | None) -> None:
        try:
            self._on_exit(process, status)
        except Exception:  # the thread must outlive any mistake of the callback
            log.exception("could not act on the end of process %d", process.pid)
