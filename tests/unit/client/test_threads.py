"""Daemon threads: how many there are, that they end, and that they hold up nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

import pytest

from rewardsignal import _threads
from rewardsignal._threads import DaemonThreads

HANGS = """
import asyncio, threading, time
import httpx2, rewardsignal as rs

class Silent(httpx2.BaseTransport):
    def handle_request(self, request):
        time.sleep(30)

async def main():
    client = rs.AsyncSignalClient("sk-test", "http://signal.test", transport=Silent())
    try:
        await asyncio.wait_for(client.models(), 0.2)
    except TimeoutError:
        print("gave up")

asyncio.run(main())
"""


def test_results_and_errors() -> None:
    threads = DaemonThreads(2, "test")
    assert threads.submit(divmod, 7, 2).result(5) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(5)
    assert list(threads.map(abs, [-1, -2, -3])) == [1, 2, 3]


def test_there_are_as_many_as_are_needed_and_no_more_than_allowed() -> None:
    threads, together, go = DaemonThreads(3, "test"), threading.Barrier(3), threading.Event()
    first = [threads.submit(go.wait, 5) for _ in range(2)]
    assert threads._threads == 2
    more = [threads.submit(go.wait, 5) for _ in range(8)]
    assert threads._threads == 3
    go.set()
    assert all(future.result(5) for future in first + more)
    # Each waits for the two others.
    for future in [threads.submit(together.wait, 5) for _ in range(3)]:
        future.result(5)
    assert threads._threads == 3


def test_they_end_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "IDLE_S", 0.02)
    threads = DaemonThreads(3, "test")
    threads.submit(abs, 1).result(5)
    deadline = time.monotonic() + 5
    while threads._threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads._threads == 0
    assert threads.submit(abs, -1).result(5) == 1


def test_a_call_that_was_cancelled_in_the_queue_is_not_made() -> None:
    threads, go, made = DaemonThreads(1, "test"), threading.Event(), []
    threads.submit(go.wait, 5)
    queued = threads.submit(made.append, 1)
    assert queued.cancel()
    go.set()
    assert threads.submit(len, made).result(5) == 0


def test_closed_threads_make_what_is_queued_and_take_no_more() -> None:
    threads, go = DaemonThreads(1, "test"), threading.Event()
    threads.submit(go.wait, 5)
    queued = threads.submit(abs, -3)
    threads.shutdown()
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(abs, 1)
    go.set()
    assert queued.result(5) == 3


def test_an_idle_thread_keeps_no_result() -> None:
    class Large: ...

    threads = DaemonThreads(1, "test")
    kept = weakref.ref(threads.submit(Large).result(5))
    threads.submit(abs, 1).result(5)
    assert kept() is None


def test_a_call_under_way_does_not_hold_up_the_end_of_the_process() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "gave up\n", done.stderr
    assert time.monotonic() - began < 15
