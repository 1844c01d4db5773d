"""Processes by pid and start time, their watcher, and worker groups, on real processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_pool.devices import Slot
from gpu_pool.exits import DEVICE_BROKEN, End
from gpu_pool.process import Process, having
from gpu_pool.state import Held, Record, StateFile, sole_agent
from gpu_pool.watch import Watcher
from gpu_pool.workers import Worker, command, environment, strays
from tests.support.valkey import settings_for

# A parent with one child in a process group of their own, as a worker is; it prints the child's pid.
_GROUP = "import os, time; child = os.fork(); child and print(child, flush=True); time.sleep(60)"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with subprocess.Popen(
        [sys.executable, "-c", _GROUP], stdout=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        parent = Process.of(popen.pid)
        assert parent is not None
        started = Worker("cpu0-0000@h", parent, tmp_path / "worker.log", popen)
        assert started.know_child(int(popen.stdout.readline()))
        yield started
        started.kill()


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_process_is_known_until_it_is_read(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert process.alive()
    process.signal(signal.SIGKILL)
    assert soon(lambda: not process.alive())
    assert process.exists()
    sleeper.wait()
    assert not process.exists()
    assert Process.of(sleeper.pid) is None


def test_another_process_with_the_pid_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    impostor = Process(process.pid, process.started + 1)
    assert not impostor.alive()
    impostor.signal(signal.SIGKILL)
    impostor.kill_group()
    time.sleep(0.05)
    assert process.alive()


class Watch:
    """A watcher whose reports are collected."""

    def __init__(self) -> None:
        self.seen: queue.Queue[tuple[Process, int | None]] = queue.Queue()
        self.watcher = Watcher(lambda process, status: self.seen.put((process, status)))


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    made.watcher.start()
    yield made
    made.watcher.close()


def test_the_end_of_a_process_is_told_at_once(
    watch: Watch, sleeper: subprocess.Popen[bytes]
) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    watch.watcher.watch(process)
    with pytest.raises(queue.Empty):
        watch.seen.get(timeout=0.1)
    began = time.monotonic()
    sleeper.kill()
    assert watch.seen.get(timeout=5) == (process, -signal.SIGKILL)
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(71)", 71),
        ("pass", 0),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_it_is_told_how_a_process_of_another_parent_ended(
    watch: Watch, code: str, status: int
) -> None:
    # The parent reads its child's status as fast as it can, which is what makes it hard to see.
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.stdin.readline()"
        ", ], stdin=subprocess.PIPE); print(child.pid, flush=True); sys.stdin.readline()"
        "; child.stdin.close(); child.wait(); sys.stdin.readline()"
    )
    child = f"import sys; sys.stdin.read(); {code}\n"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write(child)
        popen.stdin.flush()
        process = Process.of(int(popen.stdout.readline()))
        assert process is not None
        watch.watcher.watch(process)
        popen.stdin.write("\n")
        popen.stdin.flush()
        seen, found = watch.seen.get(timeout=5)
        popen.stdin.close()
    assert seen == process
    # Where the parent was faster, only a kernel since 6.15 can tell.
    assert found == status or (found is None and not _kernel_tells())


def _kernel_tells() -> bool:
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (6, 15)


def test_what_ended_before_is_told_too(watch: Watch, sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    watch.watcher.watch(Process(process.pid, process.started + 1))
    assert watch.seen.get(timeout=5)[0].pid == process.pid
    sleeper.kill()
    sleeper.wait()
    watch.watcher.watch(process)
    assert watch.seen.get(timeout=5) == (process, None)


def test_many_ends_are_told_once_each(watch: Watch) -> None:
    popens = [subprocess.Popen(["sleep", "0.05"]) for _ in range(10)]
    processes = [Process.of(popen.pid) for popen in popens]
    for process in processes:
        assert process is not None
        watch.watcher.watch(process)
    told = [watch.seen.get(timeout=5) for _ in processes]
    for popen in popens:
        popen.wait()
    assert {process.pid for process, _ in told} == {popen.pid for popen in popens}
    assert watch.seen.empty()


def test_the_watcher_survives_its_callback(sleeper: subprocess.Popen[bytes]) -> None:
    calls: queue.Queue[int] = queue.Queue()

    def fail(process: Process, _status: int | None) -> None:
        calls.put(process.pid)
        raise RuntimeError("a mistake")

    watcher = Watcher(fail)
    watcher.start()
    for _ in range(2):
        popen = subprocess.Popen(["sleep", "60"])
        process = Process.of(popen.pid)
        assert process is not None
        watcher.watch(process)
        popen.kill()
        assert calls.get(timeout=5) == popen.pid
        popen.wait()
    watcher.close()


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_worker_ends_as_a_whole(worker: Worker, victim: str) -> None:
    process = getattr(worker, victim)
    assert worker.ended() is None
    os.kill(process.pid, signal.SIGKILL)
    assert soon(lambda: worker.ended() is not None)
    end = worker.ended()
    assert end is not None
    assert end.process == process
    assert ("computing" in worker.why(end)) == (victim == "child")
    assert not worker.blames(end)
    worker.kill()
    assert soon(worker.gone)
    worker.reap()
    assert not worker.parent.exists()


def test_only_the_computing_process_can_be_brought_down_by_an_operation(worker: Worker) -> None:
    assert worker.child is not None
    assert worker.blames(End(worker.child, DEVICE_BROKEN))
    assert not worker.blames(End(worker.parent, DEVICE_BROKEN))
    worker.note_end(End(worker.child, -signal.SIGSEGV))
    worker.note_end(End(worker.parent, -signal.SIGKILL))
    end = worker.ended()
    assert end is not None
    assert worker.blames(end)
    assert worker.why(end) == "its computing process was killed by SIGSEGV"


def test_the_parents_log_tells_what_the_kernel_does_not(worker: Worker) -> None:
    assert worker.child is not None
    pid = worker.child.pid
    worker.log.write_text(f"Process 'ForkPoolWorker-1' pid:{pid} exited with 'exitcode 71'\n")
    worker.note_end(End(worker.child, None))
    end = worker.ended()
    assert end is not None
    assert worker.blames(end)


def test_a_group_ends_also_when_its_leader_is_gone(tmp_path: Path) -> None:
    """As with an adopted worker, whose parent's status is read by somebody else."""
    launcher = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "start_new_session=True); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher, _GROUP], stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        leader, child = (Process.of(int(popen.stdout.readline())) for _ in range(2))
        assert leader is not None
        assert child is not None
        os.kill(leader.pid, signal.SIGKILL)
        popen.wait(5)
    assert not leader.exists()
    assert child.alive()
    Worker("cpu0-0000@h", leader, tmp_path / "log").kill()
    assert soon(lambda: not child.alive())


def test_workers_that_no_record_names_are_found(worker: Worker, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "a b", "redis://unused", host_name="h")
    env = environment(os.environ, settings, Slot("cpu0", "cpu", "CPU", 1, 1), "cpu0-0000@h")
    with subprocess.Popen(
        [sys.executable, "-c", _GROUP], stdout=subprocess.PIPE, start_new_session=True, env=env
    ) as popen:
        assert popen.stdout is not None
        child = int(popen.stdout.readline())
        parent = Process.of(popen.pid)
        assert parent is not None
        found = strays(settings, [worker])
        known = strays(settings, [worker, Worker("x", parent, tmp_path / "log")])
        parent.kill_group()
    assert {process.pid for process in found} == {popen.pid, child}
    assert known == []
    assert soon(lambda: having("SIGNAL_NODE", "cpu0-0000@h") == [])


def test_the_kernel_takes_the_computing_process_when_memory_runs_out(worker: Worker) -> None:
    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    assert worker.child is not None
    assert score(worker.child.pid) == 500
    assert score(worker.parent.pid) < 500


def test_a_stranger_is_no_child_of_a_worker(
    worker: Worker, sleeper: subprocess.Popen[bytes]
) -> None:
    assert not worker.know_child(sleeper.pid)
    assert not worker.know_child(2**22 + 1)


def record(worker: Worker) -> Record:
    held = (Held(3, 2, ready=True), Held(4, 1, ready=False))
    return Record(worker, "cpu0", {"A": "b"}, held, ending=False)


def test_the_next_agent_finds_the_workers(worker: Worker, tmp_path: Path) -> None:
    state = StateFile(tmp_path / "run")
    assert state.read() == []
    worker.log.write_text("said before")
    worker.mark_log()
    state.write([record(worker)])
    (found,) = StateFile(tmp_path / "run").read()
    again = found.worker
    assert (again.node, again.parent, again.child) == (worker.node, worker.parent, worker.child)
    assert again.log_mark == len("said before")
    assert (found.slot, found.pins, found.ending) == ("cpu0", {"A": "b"}, False)
    assert found.held == record(worker).held
    again.kill()
    assert soon(again.gone)


def test_state_of_another_boot_or_a_torn_file_names_nobody(worker: Worker, tmp_path: Path) -> None:
    state = StateFile(tmp_path)
    state.write([record(worker)])
    path = tmp_path / "agent.json"
    text = path.read_text()
    path.write_text(text.replace('"boot": "', '"boot": "0'))
    assert state.read() == []
    for torn in (text[:40], "{}", "[]"):
        path.write_text(torn)
        assert state.read() == []


def test_one_agent_per_data_folder(tmp_path: Path) -> None:
    with (
        sole_agent(tmp_path / "run"),
        pytest.raises(RuntimeError, match="another pool agent"),
        sole_agent(tmp_path / "run"),
    ):
        pass
    with sole_agent(tmp_path / "run"):
        pass


def test_a_worker_runs_our_modules_and_knows_its_name() -> None:
    argv = command("cpu0-ab12@host")
    assert argv[:4] == [sys.executable, "-P", "-m", "celery"]
    assert argv[argv.index("-Q") + 1] == "host.cpu0-ab12@host"
    slot = Slot("cpu0", "cpu", "CPU", 1, 3)
    inherited = {"SIGNAL_DATA_DIR": "/d", "OMP_NUM_THREADS": "9"}
    env = environment(inherited, settings_for(Path("/d"), "redis://x"), slot, "cpu0-ab12@host")
    assert env["SIGNAL_DATA_DIR"] == "/d"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["SIGNAL_NODE"] == "cpu0-ab12@host"


def test_last_words_are_the_end_of_the_log(worker: Worker) -> None:
    assert worker.last_words() == ""
    worker.log.write_text("x" * 5000 + "\nModuleNotFoundError: no module\n")
    assert worker.last_words().endswith("ModuleNotFoundError: no module")
    assert len(worker.last_words()) <= 2000
    worker.mark_log()
    assert worker.last_words() == ""
    with worker.log.open("a") as log:
        log.write("MemoryError\n")
    assert worker.last_words() == "MemoryError"
