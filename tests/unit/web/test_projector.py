"""From the stream of commits to SQL."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select, update

from gpu_pool import leases
from gpu_pool.database import Database
from web.accounts.service import create_user
from web.artifacts.tables import ArtifactRow
from web.events import service as events
from web.metrics import service as metrics
from web.metrics.tables import MetricRow
from web.projector import Event, apply
from web.runs.service import Filters, Runs, close_row
from web.runs.tables import RunLabelRow, RunRow

RUN = "run_0123456789abcdef"
_PLACES = itertools.count(1)


def event(type_: str, seq: int = 0, **fields: Any) -> Event:
    """As the stream gives it."""
    raw = {"type": type_, "run": RUN, "at": "1700000000.5", **fields}
    if seq:
        raw["seq"] = str(seq)
    if "data" in raw:
        raw["data"] = json.dumps(raw["data"]) if raw["data"] != "" else ""
    fields_ = {k.encode(): v.encode() for k, v in raw.items()}
    return Event.from_redis(f"1700000000000-{next(_PLACES)}".encode(), fields_)


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


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (["placed", "worker_lost"], "queued"),
        (["placed", "ready", "worker_lost"], "rebuilding"),
        (["placed", "ready", "worker_lost", "rebuilding"], "rebuilding"),
        (["placed", "ready", "worker_lost", "rebuilding", "rebuilt", "ready"], "ready"),
        (["placed", "ready", "paused"], "paused"),
        (["placed", "ready", "paused", "resumed"], "queued"),
        (["placed", "ready", "mismatch"], "paused"),
        (["placed", "ready", "mismatch", "resumed"], "ready"),
        (["placed", "ready", "rolled_back"], "rolled_back"),
        (["placed", "ready", "rolled_back", "worker_lost", "rebuilding"], "rolled_back"),
        (["placed", "ready", "nondeterministic", "snapshot_damaged", "moved"], "ready"),
    ],
)
def test_the_status_follows_the_events(run: Database, events: list[str], status: str) -> None:
    before = ""
    for name in events:
        if name == "rebuilding":
            found = feed(run, event("placed", status=name, data={"slot": "cpu0"}))
        else:
            data = {"from": before} if name == "resumed" else {"at_seq": 0, "slot": "cpu0"}
            found = feed(run, event(name, data=data))
        before = name
    assert found.status == status
    kinds = ["placed" if name == "rebuilding" else name for name in events]
    assert [row.type for row in _page(run).events] == kinds


def test_events_are_kept_for_their_reader(run: Database) -> None:
    device = {"slot": "cpu0", "kind": "cpu", "threads": 2}
    error = {"code": "worker_lost", "message": "x", "retryable": False}
    told = [
        event("placed", status="loading", data=device),
        event("worker_lost", data={"why": "killed", "blamed": False}),
        event("closed", status="failed", data=error),
    ]
    for _ in range(2):
        feed(run, *told)
    found = _page(run)
    assert [row.type for row in found.events] == ["placed", "worker_lost", "closed"]
    assert found.events[0].data == {"device": {"slot": "cpu0", "kind": "cpu"}, "status": "loading"}
    assert found.events[1].data == {"why": "killed", "blamed": False}
    assert found.events[2].data == {"status": "failed", "error": error}
    first = _page(run, limit=1)
    assert (first.more, first.ended, found.more, found.ended) == (True, False, False, True)
    rest = _page(run, after=first.events[0].id)
    assert [row.type for row in rest.events] == ["worker_lost", "closed"]
    assert _page(run, after=found.events[-1].id).ended
    assert events.page(run, "run_unknown", 0, 10) is None


def test_a_run_has_not_ended_for_its_readers_before_its_last_event(run: Database) -> None:
    with run.writing() as session:
        close_row(session, RUN, "cancelled", None, datetime.now(UTC))
    assert not _page(run).ended
    with run.writing() as session:
        session.execute(update(RunRow).values(ended_at=datetime.now(UTC) - 2 * events.SETTLED))
    assert _page(run).ended, "with the data of Redis that event was lost"


def test_what_was_rolled_back_is_done_again_under_the_same_seqs(run: Database) -> None:
    manifest = {"name": "a", "mode": "adapter", "step": 1, "total_size_bytes": 5, "files": []}
    found = feed(
        run, commit(1), commit(2), commit(3, artifact=manifest), event("rolled_back", data={"at_seq": 1})
    )  # fmt: skip
    assert (found.projected_seq, found.status) == (1, "rolled_back")
    assert _seqs(run) == [1]
    again = {**manifest, "name": "b"}
    found = feed(run, event("resumed", data={}), commit(2, loss=2.0), commit(3, artifact=again))
    assert found.projected_seq == 3
    assert _seqs(run) == [1, 2, 3]
    with run.reading() as session:
        names = session.scalars(select(ArtifactRow.name).order_by(ArtifactRow.id)).all()
        assert names == ["a", "b"], "what was saved is a file, and stays"
        known = leases.standing(session, RUN)
        assert known is not None and known.known_seq == 3


def test_a_completed_run_keeps_its_last_certificate(run: Database) -> None:
    told = {"sha256": "aa", "step": 1}
    row = feed(run, event("commit", 4, entry="4", kind="complete", status="completed",
                          data={"step": 1, "certificate": told}))  # fmt: skip
    assert row.certificate == {**told, "seq": 4}


def _page(db: Database, after: int = 0, limit: int = 100) -> events.Page:
    found = events.page(db, RUN, after, limit)
    assert found is not None
    return found


def _seqs(db: Database) -> list[int | None]:
    rows, _ = metrics.page(db, RUN, None, 100)
    return [row.seq for row in rows]


def test_every_event_may_come_twice(run: Database) -> None:
    manifest = {"name": "a", "mode": "adapter", "step": 1, "total_size_bytes": 5, "files": []}
    told = [commit(1), commit(2, artifact=manifest), commit(3, step=1)]
    for _ in range(2):
        found = feed(run, *told)
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
