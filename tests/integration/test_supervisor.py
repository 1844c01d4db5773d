"""The supervisor with real processes that stand for nothing: restarts, failures, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_pool.process import Process
from web.stack import children, environment, leftovers
from web.stack.children import Service
from web.stack.errors import StackError
from web.stack.folder import Folder
from web.stack.supervisor import Interrupted, Supervisor

SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def supervisor(folder: Folder) -> Iterator[Supervisor]:
    made = Supervisor(folder, lambda: None)
    with made.listening():
        yield made
        made.stop(())


def service(folder: Folder, name: str, code: str, **options: object) -> Service:
    env = environment.for_process(os.environ, {environment.MARK: str(folder.root)})
    return Service(name, (sys.executable, "-P", "-c", code), env, **options)  # type: ignore[arg-type]


def later(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def stop_soon(seconds: float) -> None:
    later(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))


def eventually(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_crashed_process_is_started_again(folder, supervisor):
    child = supervisor.start(service(folder, "web", SLEEP))
    first = child.process
    assert first is not None
    later(0.2, lambda: first.signal(signal.SIGKILL))
    stop_soon(1.5)
    supervisor.loop()
    assert child.restarts == 1
    assert child.process != first
    assert child.process is not None
    assert child.process.alive()


def test_restarts_become_rarer(folder):
    child = children.Child(service(folder, "x", "pass"), folder.working, folder.log("x"))
    child.start()
    delays = [child.plan_restart() for _ in range(9)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    child.kill()


def test_a_death_during_the_start_is_told_with_its_words(folder, supervisor):
    code = "print('no such port'); raise SystemExit(3)"
    child = supervisor.start(service(folder, "web", code, serves=lambda: False))
    with pytest.raises(StackError, match=r"web ended with status 3:\nno such port"):
        supervisor.wait_until_serving([child], 10)


def test_what_never_serves_is_named(folder, supervisor):
    child = supervisor.start(service(folder, "web", SLEEP, serves=lambda: False))
    with pytest.raises(StackError, match="web does not serve in time"):
        supervisor.wait_until_serving([child], 0.3)


def test_a_signal_ends_the_wait(folder, supervisor):
    child = supervisor.start(service(folder, "web", SLEEP, serves=lambda: False))
    stop_soon(0.2)
    with pytest.raises(Interrupted):
        supervisor.wait_until_serving([child], 10)


def test_a_task_that_fails_is_told_by_its_words(folder, supervisor):
    supervisor.run_to_end(service(folder, "prepare", "pass"), 10)
    with pytest.raises(StackError, match=r"^unknown model$"):
        supervisor.run_to_end(service(folder, "prepare", "raise SystemExit('unknown model')"), 10)


def test_a_process_that_does_not_stop_is_killed(folder, supervisor):
    child = supervisor.start(service(folder, "web", STUBBORN, grace_s=0.3))
    eventually(lambda: "up" in child.words())
    supervisor.stop((("web",),))
    assert child.exit_code() == -signal.SIGKILL


def test_the_working_folder_and_the_log_are_ours(folder, supervisor):
    code = "import os, sys; print(os.getcwd(), '' in sys.path)"
    supervisor.run_to_end(service(folder, "where", code), 10)
    assert folder.log("where").read_text() == f"{folder.working} False\n"


def test_leftovers_are_found_by_their_mark_and_ended(folder, tmp_path):
    other = Folder(tmp_path / "other")
    marked = subprocess.Popen(
        [sys.executable, "-c", SLEEP], env=service(folder, "x", "").environment
    )
    unmarked = subprocess.Popen(
        [sys.executable, "-c", SLEEP], env=service(other, "x", "").environment
    )
    try:
        process = Process.of(marked.pid)
        eventually(lambda: leftovers.marked(folder) == [process])
        assert leftovers.sweep(folder) == [process]
        assert marked.wait(5) == -signal.SIGTERM
        assert leftovers.marked(folder) == []
        assert unmarked.poll() is None
    finally:
        for process in (marked, unmarked):
            process.kill()
            process.wait()
