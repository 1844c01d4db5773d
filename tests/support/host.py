"""A host for tests of the pool: a data folder with a tiny model, SQL, a Valkey and a real agent."""

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
from sqlalchemy import select

from gpu_pool import leases, overview
from gpu_pool.database import Base, Database
from gpu_pool.process import Process
from gpu_pool.tables import LeaseRequest, LeaseRow
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
        self.journal = Journal(self.redis, open_storage(self.settings), self.settings)
        self.agent: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self._runs = 0

    def start_agent(self, *before: str, change: str = "pass") -> None:
        """Starts the agent as `signal up` does. `before` is a command that becomes the agent; `change`
        is a statement that is executed in it first."""
        env = {
            **os.environ, "SIGNAL_DATA_DIR": str(self.folder), "REDIS_URL": self.valkey.url,
            "SIGNAL_SECRET": "test-secret", "SIGNAL_DEVICES": self.devices, "SIGNAL_HOST_NAME": "here",
            "PYTHONPATH": str(Path(__file__).parents[2]), **self.environment,
        }  # fmt: skip
        with (self.folder / "agent.log").open("ab") as log:
            code = f"import gpu_pool.agent; {change}; raise SystemExit(gpu_pool.agent.main())"
            command = [*before, sys.executable, "-P", "-c", code]
            self.agent = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        assert self.agent is not None
        self.agent.send_signal(number)
        return self.agent.wait(40)

    def create_run(self, *, shared: bool = False, **config: Any) -> str:
        """A new run, as the web tier makes it: the journal inside the transaction. `shared`: it may join
        others; the tests of one run on one slot mean runs that do not."""
        self._runs += 1
        run_id = f"run_{self._runs:016x}"
        config = {**CONFIG, **config}
        with self.database.writing() as session:
            wants = {
                "base_model": config["base_model"],
                "config": config,
                "owner": "user_1",
                "shares": {"cpu": {"base": config["base_model"]}} if shared else {},
            }
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

    def result(self, run_id: str, number: int) -> dict[str, Any]:
        """The result of an operation that must succeed, once it has ended."""
        entry = self.finished(run_id, number)
        assert entry.status == "completed", entry
        found: dict[str, Any] = json.loads(self.journal.result(entry) or b"")
        return found

    def train(self, run_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """The numbers of steps `first` to `last`, each on rows of its own."""
        numbers = []
        for step in range(first, last + 1):
            numbers.append(forward_backward(self, run_id, length=8 + step))
            numbers.append(self.submit(run_id, "optim_step", on_error="fail"))
        results = [self.result(run_id, number) for number in numbers]
        kept = ("seq", "loss", "loss_sum", "grad_norm", "step")
        return [{name: one[name] for name in kept if name in one} for one in results]

    def events(self, run_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What happened to a run, but for its commits."""
        stream: Any = self.redis.xrange(keys.COMMITS)
        found = []
        for _, row in stream:
            if row[b"run"].decode() == run_id and row[b"type"] != b"commit":
                found.append((row[b"type"].decode(), json.loads(row.get(b"data") or b"{}")))
        return found

    def happened(self, run_id: str, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [data for name, data in self.events(run_id) if name == kind]

    def await_events(self, run_id: str, kind: str, count: int) -> list[dict[str, Any]]:
        """The events of one kind, once there are so many."""
        until(lambda: len(self.happened(run_id, kind)) >= count)
        return self.happened(run_id, kind)

    def request(self, run_id: str) -> LeaseRequest:
        """The run's request in SQL."""
        with self.database.reading() as session:
            return session.scalars(select(LeaseRequest).where(LeaseRequest.run_id == run_id)).one()

    def reasons(self, run_id: str) -> list[str | None]:
        """Why the run's leases ended, in order; None for an open one."""
        query = select(LeaseRow.reason).where(LeaseRow.run_id == run_id).order_by(LeaseRow.epoch)
        with self.database.reading() as session:
            return list(session.scalars(query))

    def head(self, run_id: str) -> Head:
        head = self.journal.head(run_id)
        assert head is not None
        return head

    def await_ready(self, run_id: str, after: int = 0) -> Head:
        """The head of a run that is ready, under an epoch above `after`."""

        def look() -> bool:
            head = self.head(run_id)
            return bool(head.closed) or (head.worker_state == "ready" and head.epoch > after)

        until(look)
        assert not self.head(run_id).closed, self.head(run_id).close_error
        return self.head(run_id)

    def await_closed(self, run_id: str) -> Head:
        until(lambda: self.head(run_id).closed)
        return self.head(run_id)

    def slots(self) -> list[tuple[str, str | None]]:
        """(state, run) of every slot, once for each run that is there."""
        with self.database.reading() as session:
            shown = overview.describe(session)["slots"]
        return [
            (slot["state"], run_id)
            for slot in shown
            for run_id in [run["run_id"] for run in slot["runs"]] or [None]
        ]

    def await_free(self) -> None:
        """Waits until no slot is leased."""
        until(lambda: {run_id for _, run_id in self.slots()} == {None})

    def await_free_slots(self, count: int) -> None:
        """Waits until so many slots are free."""
        until(lambda: sum(run_id is None for _, run_id in self.slots()) == count)

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


def rows(*lengths: int) -> dict[str, Any]:
    """Token rows of these lengths, as the web tier packs them."""
    total = sum(lengths)
    tokens = (np.arange(total) % 200 + 5).astype("<i4")
    return {
        "lengths": list(lengths),
        "tokens": tokens.tobytes(),
        "targets": np.roll(tokens, -1).tobytes(),
        "weights": np.ones(total, "<f4").tobytes(),
    }


def forward_backward(host: Host, run_id: str, *, silently: bool = False, length: int = 16) -> int:
    """Submits one on two rows; its entry number."""
    body: dict[str, Any] = {"loss_fn": "causal_lm", "loss_kwargs": {}, "accumulate": False}
    return host.submit(run_id, "forward_backward", silently=silently, **body, rows=rows(length, 12))


def sample(host: Host, run_id: str, tokens: int) -> int:
    """Submits a sample that takes a while; its entry number."""
    body: dict[str, Any] = {
        "prompts": [[5, 6, 7]], "n": 1, "max_tokens": tokens, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "stop_strings": [], "stop_token_ids": [], "seed": 1, "logprobs": False,
    }  # fmt: skip
    return host.submit(run_id, "sample", **body)


def pids_of(host: Host, head: Head) -> tuple[int, int]:
    """Parent and child of the worker that has the run."""
    report = host.reports()[head.worker]
    return int(report["parent_pid"]), int(report["pid"])


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that live."""
    found = [Process.of(pid) for pid in pids]
    return [process.pid for process in found if process is not None and process.alive()]
