"""From the stream of commits to SQL."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import select

from gpu_pool import leases
from gpu_pool.database import Database
from web.accounts.service import create_user
from web.artifacts.tables import ArtifactRow
from web.metrics import service as metrics
from web.metrics.tables import MetricRow
from web.projector import Event, apply
from web.runs.service import Filters, Runs
from web.runs.tables import RunLabelRow, RunRow

RUN = "run_0123456789abcdef"


def event(type_: str, seq: int = 0, **fields: Any) -> Event:
    """As the stream gives it."""
    raw = {"type": type_, "run": RUN, "at": "1700000000.5", **fields}
    if seq:
        raw["seq"] = str(seq)
    if "data" in raw:
        raw["data"] = json.dumps(raw["data"]) if raw["data"] != "" else ""
    return Event.from_redis({k.encode(): v.encode() for k, v in raw.items()})


def commit(seq: int, step: int = 0, **data: Any) -> Event:
    """A finished forward_backward."""
    body = {"step": step, "metrics": {"loss": 1.0}, **data}
    return event("commit", seq, entry="1", kind="forward_backward", status="completed", data=body)


@pytest.fixture
def run(db: Database) -> Database:
    """The database with one queued run in it."""
    add_run(db, RUN, {"team": "a"})
    return db


def add_run(db: Database, run_id: str, labels: dict[str, str], status: str = "queued") -> None:
    user = create_user(db, "ann")
    with db.writing() as session:
        found = RunRow(
            run_id=run_id, user_id=user.id, base_model="tiny", config={}, labels=labels,
            status=status,
        )  # fmt: skip
        session.add(found)
        session.flush()
        for name, value in labels.items():
            session.add(RunLabelRow(run=found.id, name=name, value=value))
        leases.request(session, run_id, {"base_model": "tiny", "config": {}})


def feed(db: Database, *events: Event) -> RunRow:
    with db.writing() as session:
        apply(session, RUN, events)
    with db.reading() as session:
        return session.scalars(select(RunRow).where(RunRow.run_id == RUN)).one()


def test_a_runs_life(run: Database) -> None:
    placed = feed(run, event("placed", data={"slot": "cpu0"}))
    assert (placed.status, placed.device) == ("loading", {"slot": "cpu0"})
    assert placed.started_at is not None
    ready = feed(run, event("ready", data={"slot": "cpu0", "dtype": "float32"}))
    assert (ready.status, ready.device) == ("ready", {"slot": "cpu0", "dtype": "float32"})
    closed = feed(run, commit(1, step=1), event("closed", status="completed", data=""))
    assert (closed.status, closed.current_step, closed.error) == ("completed", 1, None)
    assert closed.ended_at is not None


def test_every_event_may_come_twice(run: Database) -> None:
    manifest = {"name": "a", "mode": "adapter", "step": 1, "total_size_bytes": 5, "files": []}
    events = [commit(1), commit(2, artifact=manifest), commit(3, step=1)]
    for _ in range(2):
        found = feed(run, *events)
    assert (found.projected_seq, found.current_step) == (3, 1)
    with run.reading() as session:
        assert session.scalars(select(MetricRow.seq).order_by(MetricRow.id)).all() == [1, 2, 3]
        assert session.scalars(select(ArtifactRow.name)).all() == ["a"]


def test_the_first_end_stands_and_frees_the_place_in_the_queue(run: Database) -> None:
    error = {"code": "worker_lost", "message": "x", "retryable": False}
    feed(run, event("closed", status="failed", data=error))
    found = feed(run, event("closed", status="completed", data=""), event("ready", data={}))
    assert (found.status, found.error) == ("failed", error)
    with run.reading() as session:
        assert leases.queue_position(session, RUN) is None


def test_an_unknown_run_is_passed_over(db: Database) -> None:
    with db.writing() as session:
        apply(session, RUN, [commit(1)])


def test_an_operation_without_numbers_leaves_no_row(run: Database) -> None:
    found = feed(run, commit(1, metrics={}))
    assert found.projected_seq == 1
    assert metrics.page(run, RUN, None, 10) == ([], False)


def test_own_numbers_stand_beside_the_runs_and_are_recorded_once(run: Database) -> None:
    feed(run, commit(1))
    made = metrics.add_own(run, RUN, 4, {"reward": 0.5}, "token")
    assert metrics.add_own(run, RUN, 4, {"reward": 0.5}, "token").id == made.id
    rows, more = metrics.page(run, RUN, None, 1)
    assert more
    assert rows[0].source == "run"
    rows, more = metrics.page(run, RUN, rows[0].id, 1)
    assert not more
    assert (rows[0].source, rows[0].seq, rows[0].numbers) == ("user", None, {"reward": 0.5})


def test_lists_of_runs_are_paged_and_filtered(run: Database) -> None:
    user = create_user(run, "ann").id
    for number in range(4):
        status = "completed" if number == 2 else "queued"
        add_run(run, f"run_{number}", {"n": str(number), "x": "same"}, status)
    runs = Runs(None, run, None, None)  # type: ignore[arg-type]

    def ids(filters: Filters, before: int | None = None, limit: int = 10) -> list[str]:
        return [row.run_id for row in runs.page(user, filters, before, limit)[0]]

    assert ids(Filters()) == ["run_3", "run_2", "run_1", "run_0", RUN]
    first, more = runs.page(user, Filters(), None, 2)
    assert more
    assert ids(Filters(), first[-1].id) == ["run_1", "run_0", RUN]
    assert ids(Filters(status="completed")) == ["run_2"]
    assert ids(Filters(label="x")) == ["run_3", "run_2", "run_1", "run_0"]
    assert ids(Filters(label="n=1")) == ["run_1"]
    assert ids(Filters(label="n=")) == []
    assert runs.page(create_user(run, "bob").id, Filters(), None, 10) == ([], False)
