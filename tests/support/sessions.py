"""A session in the test's own process, on a real journal: a worker without Celery and the agent."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from workers.engine.base import load_base
from workers.executing import Executing
from workers.queue.app import make_app
from workers.queue.journal import Journal
from workers.queue.records import NewEntry, Past
from workers.session.arrival import arrive
from workers.session.events import OperationEvents
from workers.session.rota import Rota
from workers.session.sampling import Sampler
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
        self.pause: Callable[[], None] = lambda: None
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
        self._base.pause = self.pause
        events = OperationEvents(make_app(self.journal.settings), self.journal.settings, "w@h")
        worker = Worker(
            f"w{epoch}@h", events, lambda: None, lambda: self.stopping, self.pause, self._sampler()
        )
        session = Session(self.journal, run_id, epoch, spec, self._base, self.model, worker)
        arrive(session, spec, 0.0)
        return session

    def _sampler(self) -> Sampler:
        return Sampler()


class Together(Sessions):
    """Sessions that take turns on the base, as in one worker."""

    def __init__(self, journal: Journal, model: Path) -> None:
        """See Sessions."""
        super().__init__(journal, model)
        self.breaths, self.sampler = 0, Sampler()
        self.rota = Rota(
            journal,
            Executing(journal.settings.data_dir / "now"),
            self.sampler,
            between=self._breathe,
            stopping=lambda: self.stopping,
            drop=self._drop,
        )
        self.pause = self.rota.pause

    def attach(self, run_id: str, epoch: int, **changes: Any) -> Session:
        """See Sessions."""
        with self.rota.executing.of(run_id):
            session = super().attach(run_id, epoch, **changes)
        self.rota.join(session)
        return session

    def _sampler(self) -> Sampler:
        return self.sampler

    def _breathe(self) -> None:
        self.breaths += 1

    def _drop(self, run_id: str) -> None:
        self.rota.leave(run_id)


def batch(seed: int, rows: int = 2, tokens: int = 20, high: int = 500) -> NewEntry:
    """A forward_backward of so many random rows with ids below `high`, that counts as so many `tokens`."""
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        ids = [rng.randrange(5, high) for _ in range(rng.randrange(6, 14))]
        made.append(
            Row(array("i", ids[:-1]), array("i", ids[1:]), array("f", [1.0] * (len(ids) - 1)))
        )
    body = {
        "loss_fn": "cross_entropy",
        "loss_kwargs": {},
        "accumulate": True,
        "rows": pack_rows(made),
    }
    digest = f"b{seed}-{rows}-{high}"
    return NewEntry("forward_backward", msgpack.packb(body), tokens=tokens, digest=digest)


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
