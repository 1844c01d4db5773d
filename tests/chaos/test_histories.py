"""Journals recorded by released versions: this one must read them and come to what they came to, for ever."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.record import HISTORIES
from tests.support.valkey import running_valkey, settings_for
from workers.queue.app import make_app
from workers.queue.journal import Journal, connect
from workers.queue.records import Past
from workers.queue.segments import Segments
from workers.session.events import OperationEvents
from workers.session.restore import Rebuilder, Rebuilt, Source
from workers.session.session import Session, Worker
from workers.storage import LocalStorage

RECORDED = sorted(path.name for path in HISTORIES.iterdir() if (path / "history.json").exists())
# The operations after which the state is that of the certificate.
STATELESS = ("certificate", "complete")


@dataclasses.dataclass
class History:
    """A recorded run, in a storage of the test's own."""

    told: dict[str, Any]
    model: Path
    storage: LocalStorage
    journal: Journal

    @property
    def run_id(self) -> str:
        """The run."""
        return str(self.told["run_id"])

    @property
    def last(self) -> int:
        """The last operation that could change the state."""
        rows = self.told["operations"]
        return int(max(row["seq"] for row in rows if row["kind"] not in STATELESS))

    def past(self) -> list[Past]:
        """The journal as this version reads it."""
        return list(self.journal.past(self.run_id, 0, len(self.told["operations"])))

    def session(self) -> Session:
        """A session in this process that has executed nothing."""
        from workers.engine.base import load_base

        settings = self.journal.settings
        base = load_base(self.model, dtype="float32", device="cpu", threads=1)
        spec = {
            "base_model": "tiny", "config": self.told["config"], "owner": "history",
            "device": {"kind": "cpu", "threads": 1}, "projected_seq": 0, "origin": None,
        }  # fmt: skip
        events = OperationEvents(make_app(settings), settings, "history")
        worker = Worker("history", events, lambda: None, lambda: False)
        return Session(self.journal, self.run_id, 1, spec, base, self.model, worker)


@pytest.fixture(params=RECORDED)
def history(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[History]:
    """Each recorded one."""
    folder, root = HISTORIES / request.param, tmp_path / "store"
    shutil.copytree(folder / "runs", root / "runs")
    told = json.loads((folder / "history.json").read_text())
    with running_valkey(tmp_path) as valkey:
        settings = settings_for(tmp_path, valkey.url)
        redis, storage = connect(valkey.url), LocalStorage(root)
        try:
            yield History(told, folder / "model", storage, Journal(redis, storage, settings))
        finally:
            redis.close()


def test_there_is_one() -> None:
    assert RECORDED


def test_order_kinds_and_statuses(history: History) -> None:
    read = [(past.seq, past.kind, past.status) for past in history.past()]
    assert read == [(row["seq"], row["kind"], row["status"]) for row in history.told["operations"]]


@pytest.mark.parametrize("from_snapshot", [False, True])
def test_the_numbers_and_the_state(history: History, from_snapshot: bool) -> None:
    session = history.session()
    rebuilder = Rebuilder(history.journal, session, session.fingerprint, session.fingerprint_id)
    found = rebuilder.restore(history.run_id) if from_snapshot else Rebuilt()
    assert (found.from_seq > 0) == from_snapshot
    rebuilder.replay(Source(history.run_id, history.last), found)
    assert found.compared > 0
    assert found.mismatch is None, found.mismatch
    recorded = history.told["certificate"]
    if session.fingerprint == recorded["fingerprint"]:
        assert session.primitives.certificate()["sha256"] == recorded["sha256"]


def test_every_answer(history: History) -> None:
    """What the operations answer, not only what a rebuild compares."""
    session, rows = history.session(), history.told["operations"]
    exact = session.fingerprint == history.told["certificate"]["fingerprint"]
    for past, row in zip(history.past(), rows, strict=True):
        if row["result"] is None or past.kind == "save_state":
            continue
        if past.record.get("effect") == "cleared":
            session.clear()
        elif past.status == "completed":
            outcome = session.redo(past)
            assert outcome.status == past.status
            agree(json.loads(outcome.result), row["result"], exact)


def agree(found: Any, recorded: Any, exact: bool) -> None:
    """Every recorded number is there; equal, or within 1e-4 where the setting is another."""
    if isinstance(recorded, dict):
        for name, value in recorded.items():
            agree(found[name], value, exact)
    elif isinstance(recorded, float) and not exact:
        assert math.isclose(found, recorded, rel_tol=1e-4, abs_tol=1e-4)
    elif exact or not isinstance(recorded, list):
        assert found == recorded


def test_a_changed_number_is_found_and_named(history: History) -> None:
    """A journal that this engine does not come to is refused, with the operation that differs."""
    past = history.past()
    at = next(i for i, one in enumerate(past) if i > 10 and one.kind == "forward_backward")
    numbers = past[at].record["numbers"]
    wrong = {**numbers, "loss": numbers["loss"] * 1.001}
    past[at] = dataclasses.replace(past[at], record={**past[at].record, "numbers": wrong})
    history.storage.delete(f"runs/{history.run_id}/journal")
    journal = Journal(history.journal.redis, history.storage, history.journal.settings)
    Segments(history.storage).write(history.run_id, past)
    session = history.session()
    rebuilder, found = (
        Rebuilder(journal, session, session.fingerprint, session.fingerprint_id),
        Rebuilt(),
    )
    rebuilder.replay(Source(history.run_id, history.last), found)
    assert found.mismatch is not None
    assert (found.mismatch["seq"], found.mismatch["kind"]) == (at + 1, "forward_backward")
