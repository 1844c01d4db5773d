"""A session in the test's own process, on a real journal: a worker without Celery and the agent."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import msgpack

from workers.engine.base import load_base
from workers.queue.app import make_app
from workers.queue.journal import Journal
from workers.queue.records import NewEntry, Past
from workers.session.arrival import arrive
from workers.session.events import OperationEvents
from workers.session.session import Session, Worker
from workers.text.rows import Row, pack_rows

CONFIG: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8.0,
    "lora_target_modules": None,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "gradient_checkpointing": False,
    "seed": 3,
}


class Sessions:
    """Makes sessions of runs on one journal and one tiny model."""

    def __init__(self, journal: Journal, model: Path, *, own: bool = True) -> None:
        """The base is loaded at the first session; `own` is false where all of it is trained."""
        self.journal, self.model, self.own = journal, model, own
        self.stopping = False
        self._base: Any = None

    def attach(self, run_id: str, epoch: int, **changes: Any) -> Session:
        """A new worker's session under a new epoch, at its place in the journal."""
        assert self.journal.install_epoch(run_id, epoch, f"w{epoch}@h", {"kind": "cpu"})
        spec = {
            "base_model": "tiny",
            "config": CONFIG,
            "device": {"kind": "cpu", "host": "h", "slot": "cpu0", "name": "test"},
            "owner": "user_1",
            "origin": None,
            "projected_seq": 0,
            **changes,
        }
        self._base = self._base or load_base(self.model, threads=1, own=self.own)
        events = OperationEvents(make_app(self.journal.settings), self.journal.settings, "w@h")
        worker = Worker(f"w{epoch}@h", events, lambda: None, lambda: self.stopping)
        session = Session(self.journal, run_id, epoch, spec, self._base, self.model, worker)
        arrive(session, spec, 0.0)
        return session


def batch(seed: int) -> NewEntry:
    """A forward_backward of two random rows."""
    rng = random.Random(seed)
    rows = []
    for _ in range(2):
        ids = [rng.randrange(5, 500) for _ in range(rng.randrange(6, 14))]
        rows.append(
            Row(array("i", ids[:-1]), array("i", ids[1:]), array("f", [1.0] * (len(ids) - 1)))
        )
    body = {
        "loss_fn": "cross_entropy",
        "loss_kwargs": {},
        "accumulate": True,
        "rows": pack_rows(rows),
    }
    return NewEntry("forward_backward", msgpack.packb(body), tokens=20, digest=f"b{seed}")


def step(learning_rate: float | None = 1e-2) -> NewEntry:
    """An optim_step."""
    return NewEntry(
        "optim_step", msgpack.packb({"learning_rate": learning_rate}), digest=f"s{learning_rate}"
    )


def loop(steps: int, accumulate: int = 2) -> list[NewEntry]:
    """A plan in which every number depends on all that was before."""
    found: list[NewEntry] = []
    for i in range(steps):
        found += [batch(10 * i + k) for k in range(1 + i % accumulate)]
        found.append(step(1e-2 / (1 + i % 3)))
    return found


def numbers(journal: Journal, run_id: str, upto: int) -> list[dict[str, Any]]:
    """What was answered, by the journal's records."""
    return [past.record.get("numbers", {}) for past in history(journal, run_id, upto)]


def history(journal: Journal, run_id: str, upto: int) -> list[Past]:
    """The journal up to a seq."""
    return list(journal.past(run_id, 0, upto))
