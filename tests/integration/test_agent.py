"""The pool's agent with a real Redis-protocol server, real Celery workers and a tiny real model.

One agent with two CPU slots serves the module; tests that stop or break it start their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest

import gpu_pool.tables  # noqa: F401 - registers the tables
from gpu_pool import leases
from gpu_pool.database import Base, Database
from gpu_pool.process import Process
from tests.support.tiny import make_tiny_model
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.queue import keys
from workers.queue.app import make_app, ring
from workers.queue.journal import Journal, connect
from workers.queue.records import Entry, Head, NewEntry
from workers.storage import open_storage

T = TypeVar("T")

CONFIG: dict[str, Any] = {
    "base_model": "tiny", "lora_r": 4, "lora_alpha": 4.0, "seed": 0, "learning_rate": 0.01,
    "lora_target_modules": ["q_proj", "v_proj"], "weight_decay": 0.0, "max_seq_length": 64,
    "gradient_checkpointing": False, "bf16": None, "optimizer": "adamw",
}  # fmt: skip


def until(what: Callable[[], T | None], seconds: float = 40.0) -> T:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return answer


class Host:
    """A data folder with a model, a database, a Valkey and an agent, and a client's view of them."""

    def __init__(self, folder: Path, valkey: Valkey, slots: int) -> None:
        self.folder, self.valkey, self.devices = folder, valkey, f"cpu:{slots}x1"
        self.settings = settings_for(folder, valkey.url, host_name="here", devices=self.devices)
        model = make_tiny_model(folder / "tiny model")
        entry = {"name": "tiny", "path": str(model), "added_at": "2026-11-23T00:00:00Z"}
        self.settings.models_file.write_text(json.dumps({"models": [entry]}))
        self.database = Database(self.settings.database_url)
        Base.metadata.create_all(self.database.engine)
        self.redis, self.app = connect(valkey.url), make_app(self.settings)
        self.journal = Journal(self.redis, open_storage(folder), self.settings)
        self.agent: subprocess.Popen[bytes] | None = None
        self._runs = 0

    def start_agent(self) -> None:
        """Starts the agent as `signal up` does."""
        env = {
            **os.environ, "SIGNAL_DATA_DIR": str(self.folder), "REDIS_URL": self.valkey.url,
            "SIGNAL_SECRET": "test-secret", "SIGNAL_DEVICES": self.devices, "SIGNAL_HOST_NAME": "here",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        with (self.folder / "agent.log").open("ab") as log:
            command = [sys.executable, "-P", "-m", "gpu_pool.agent"]
            self.agent = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        assert self.agent is not None
        self.agent.send_signal(number)
        return self.agent.wait(30)

    def create_run(self, **config: Any) -> str:
        """A new run, as the web tier makes it: the journal inside the transaction."""
        self._runs += 1
        run_id = f"run_{self._runs:016x}"
        config = {**CONFIG, **config}
        with self.database.writing() as session:
            wants = {"base_model": config["base_model"], "config": config}
            leases.request(session, run_id, wants)
            self.journal.open_run(run_id, "user_1")
        return run_id

    def submit(self, run_id: str, kind: str, *, silently: bool = False, **body: Any) -> int:
        """Appends an operation; `silently`, without ringing. Returns its entry number."""
        appended, eligible, bell_was_free = self.journal.append(
            run_id, [NewEntry(kind, msgpack.packb(body))]
        )
        if not silently:
            ring(self.app, self.settings, run_id, eligible, bell_was_free)
        return appended[0].entry

    def finished(self, run_id: str, number: int) -> Entry:
        """The operation, once it has ended."""

        def look() -> Entry | None:
            (entry,) = self.journal.entries(run_id, [number])
            return entry if entry is not None and entry.finished else None

        return until(look)

    def head(self, run_id: str) -> Head:
        head = self.journal.head(run_id)
        assert head is not None
        return head

    def await_ready(self, run_id: str) -> Head:
        until(lambda: self.head(run_id).worker_state == "ready" or self.head(run_id).closed)
        assert not self.head(run_id).closed, self.head(run_id).close_error
        return self.head(run_id)

    def await_closed(self, run_id: str) -> Head:
        until(lambda: self.head(run_id).closed)
        return self.head(run_id)

    def slots(self) -> list[tuple[str, str | None]]:
        """(state, run) of every slot."""
        with self.database.reading() as session:
            shown = leases.describe(session)["slots"]
        return [(slot["state"], slot["run_id"]) for slot in shown]

    def await_free(self) -> None:
        until(lambda: {run_id for _, run_id in self.slots()} == {None})

    def reports(self) -> dict[str, dict[str, str]]:
        """What the workers say of themselves, by node."""
        redis: Any = self.redis
        names = [name.decode() for name in redis.scan_iter("sig:worker:*")]
        return {
            name.removeprefix("sig:worker:"): {
                key.decode(): value.decode() for key, value in redis.hgetall(name).items()
            }
            for name in names
        }

    def broker_keys(self, run_id: str) -> list[bytes]:
        """What the broker holds under the name of the run's queue."""
        redis: Any = self.redis
        return [name for name in redis.keys("*") if keys.queue(run_id).encode() in name]

    def close(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.stop_agent()
        self.database.close()
        self.redis.close()
        self.app.close()


@contextmanager
def running_host(folder: Path, slots: int) -> Iterator[Host]:
    folder.mkdir()
    with running_valkey(folder) as valkey:
        host = Host(folder, valkey, slots)
        try:
            yield host
        except BaseException:
            print((folder / "agent.log").read_text())
            for log in (folder / "logs").glob("*.log"):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}")
            raise
        finally:
            host.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running_host(tmp_path_factory.mktemp("pool") / "data folder", slots=2) as host:
        host.start_agent()
        yield host


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """The shared host, with no run on it before and after the test."""
    yield shared
    for run_id in shared.journal.open_runs():
        shared.journal.close(run_id, "cancelled")
    shared.await_free()


@pytest.fixture
def own_host(tmp_path: Path) -> Iterator[Host]:
    """A host with one slot that the test may break; its agent is still to be started."""
    with running_host(tmp_path / "data folder", slots=1) as host:
        yield host


def rows(*lengths: int) -> dict[str, Any]:
    total = sum(lengths)
    tokens = (np.arange(total) % 200 + 5).astype("<i4")
    return {
        "lengths": list(lengths),
        "tokens": tokens.tobytes(),
        "targets": np.roll(tokens, -1).tobytes(),
        "weights": np.ones(total, "<f4").tobytes(),
    }


def forward_backward(host: Host, run_id: str, *, silently: bool = False) -> int:
    body: dict[str, Any] = {"loss_fn": "causal_lm", "loss_kwargs": {}, "accumulate": False}
    return host.submit(run_id, "forward_backward", silently=silently, **body, rows=rows(16, 12))


def pids_of(host: Host, head: Head) -> tuple[int, int]:
    report = host.reports()[head.worker]
    return int(report["parent_pid"]), int(report["pid"])


def alive(pids: Sequence[int]) -> list[int]:
    found = [Process.of(pid) for pid in pids]
    return [process.pid for process in found if process is not None and process.alive()]


def test_a_run_gets_a_worker_and_trains(host: Host) -> None:
    run_id = host.create_run()
    head = host.await_ready(run_id)
    assert head.epoch == 1
    assert head.device is not None
    assert (head.device["host"], head.device["kind"]) == ("here", "cpu")
    assert ("leased", run_id) in host.slots()
    numbers = [forward_backward(host, run_id), host.submit(run_id, "optim_step", on_error="fail")]
    assert [host.finished(run_id, number).status for number in numbers] == ["completed"] * 2
    assert host.head(run_id).state["step"] == 1


def test_a_run_that_ends_leaves_the_slot_free_and_the_broker_clean(host: Host) -> None:
    run_id = host.create_run()
    node = host.await_ready(run_id).worker
    number = host.submit(run_id, "complete", save=False, name=None)
    assert host.finished(run_id, number).status == "completed"
    host.await_free()
    assert host.head(run_id).closed == "completed"
    assert host.broker_keys(run_id) == []
    assert 0 < host.redis.ttl(keys.prefix(run_id) + "head") <= host.settings.result_ttl_s
    assert host.reports()[node]["run"] == ""


def test_a_warm_worker_serves_the_next_run_at_once(host: Host) -> None:
    first = host.create_run()
    node = host.await_ready(first).worker
    host.journal.close(first, "cancelled")
    host.await_free()
    began = time.monotonic()
    head = host.await_ready(host.create_run())
    took = time.monotonic() - began
    # The same worker, because it holds the model: placement prefers it to one that does not.
    assert head.worker == node
    assert took < 2.0


def test_runs_wait_their_turn(host: Host) -> None:
    runs = [host.create_run() for _ in range(4)]
    for run_id in runs[:2]:
        host.await_ready(run_id)
    with host.database.reading() as session:
        positions = [leases.queue_position(session, run_id) for run_id in runs]
    assert positions == [None, None, 0, 1]
    waiting = forward_backward(host, runs[3])
    host.journal.close(runs[2], "cancelled")
    host.journal.close(runs[0], "cancelled")
    assert host.finished(runs[3], waiting).status == "completed"


def test_a_run_cancelled_while_it_waits_is_cleared_away(host: Host) -> None:
    runs = [host.create_run() for _ in range(3)]
    for run_id in runs[:2]:
        host.await_ready(run_id)
    forward_backward(host, runs[2])
    assert host.broker_keys(runs[2])
    host.journal.close(runs[2], "cancelled")
    until(lambda: not host.broker_keys(runs[2]))
    with host.database.reading() as session:
        assert leases.queue_position(session, runs[2]) is None
    until(lambda: host.redis.ttl(keys.prefix(runs[2]) + "head") > 0)


def test_a_lost_doorbell_is_rung_again(host: Host) -> None:
    run_id = host.create_run()
    host.await_ready(run_id)
    number = forward_backward(host, run_id, silently=True)
    began = time.monotonic()
    assert host.finished(run_id, number).status == "completed"
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_killed_worker_fails_its_run_and_nothing_else(host: Host, victim: str) -> None:
    struck, other = host.create_run(), host.create_run()
    head = host.await_ready(struck)
    host.await_ready(other)
    pids = pids_of(host, head)
    number = forward_backward(host, struck, silently=True)
    os.kill(pids[0 if victim == "parent" else 1], signal.SIGKILL)
    began = time.monotonic()
    closed = host.await_closed(struck)
    assert time.monotonic() - began < 2.0
    assert closed.closed == "failed"
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"
    ended = host.finished(struck, number)
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"
    until(lambda: not alive(pids))
    assert host.finished(other, forward_backward(host, other)).status == "completed"
    next_run = host.create_run()
    host.await_ready(next_run)
    assert host.broker_keys(struck) == []


def test_a_model_that_cannot_be_loaded_fails_the_run_with_the_reason(host: Host) -> None:
    run_id = host.create_run(base_model="no-such-model")
    closed = host.await_closed(run_id)
    assert closed.closed == "failed"
    assert closed.close_error is not None
    assert closed.close_error["code"] == "unknown_model"
    host.await_free()


def test_only_one_agent_serves_a_data_folder(host: Host) -> None:
    until(lambda: len(host.reports()) == 2)
    first = host.agent
    assert first is not None
    host.start_agent()
    assert host.agent is not None
    refused, host.agent = host.agent, first
    assert refused.wait(30) == 2
    assert first.poll() is None
    assert "another pool agent" in (host.folder / "agent.log").read_text()


def test_an_absent_redis_costs_no_lease(host: Host) -> None:
    run_id = host.create_run()
    before = host.await_ready(run_id)
    host.valkey.kill()
    time.sleep(3.0)
    host.valkey.start()
    number = forward_backward(host, run_id)
    assert host.finished(run_id, number).status == "completed"
    after = host.head(run_id)
    assert (after.epoch, after.worker, after.closed) == (before.epoch, before.worker, "")
    host.await_ready(host.create_run())


def test_a_worker_killed_while_redis_is_away_is_told_later(host: Host) -> None:
    run_id = host.create_run()
    pids = pids_of(host, host.await_ready(run_id))
    host.valkey.kill()
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not alive(pids), 5.0)
    host.valkey.start()
    closed = host.await_closed(run_id)
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"


def test_a_worker_that_dies_at_its_start_fails_the_run_with_its_last_words(own_host: Host) -> None:
    # Celery itself imports from the working folder, which is why that is an empty one of ours.
    broken = own_host.folder / "run" / "empty" / "workers.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise RuntimeError('broken on purpose')\n")
    own_host.start_agent()
    closed = own_host.await_closed(own_host.create_run())
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_start_failed"
    assert "broken on purpose" in closed.close_error["message"]
    broken.unlink()
    own_host.await_ready(own_host.create_run())


def test_sigterm_leaves_no_process_and_frees_the_slots(own_host: Host) -> None:
    own_host.start_agent()
    run_id = own_host.create_run()
    head = own_host.await_ready(run_id)
    until(lambda: len(own_host.reports()) == 1)
    pids = [int(r[name]) for r in own_host.reports().values() for name in ("pid", "parent_pid")]
    assert own_host.stop_agent() == 0
    assert alive(pids) == []
    assert own_host.slots() == [("down", None)]
    assert own_host.head(run_id).closed == "failed"
    assert own_host.reports() == {}
    assert own_host.broker_keys(run_id) == []
    assert head.worker


def test_the_next_agent_ends_what_a_killed_one_left(own_host: Host) -> None:
    own_host.start_agent()
    run_id = own_host.create_run()
    pids = pids_of(own_host, own_host.await_ready(run_id))
    own_host.stop_agent(signal.SIGKILL)
    # Workers outlive their agent: the run goes on as long as nobody takes over.
    assert own_host.finished(run_id, forward_backward(own_host, run_id)).status == "completed"
    own_host.start_agent()
    closed = own_host.await_closed(run_id)
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"
    until(lambda: not alive(pids))
    own_host.await_ready(own_host.create_run())


def test_a_worker_that_cannot_be_started_at_all_fails_the_run(own_host: Host) -> None:
    (own_host.folder / "logs").write_text("a file where the folder of logs should be")
    own_host.start_agent()
    closed = own_host.await_closed(own_host.create_run())
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_start_failed"
    (own_host.folder / "logs").unlink()
    own_host.await_ready(own_host.create_run())
