"""Clients that vanish and checkpoints whose time is over, on a real journal and a real database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from gpu_pool.database import Database
from tests.support.valkey import Valkey, running_valkey, settings_for
from tests.unit.web.test_projector import RUN, add_run
from web import migrate
from web.runs.tables import RunRow
from web.tinker import sessions, sweeping
from web.tinker.tables import LIVE, SAMPLER, TRAINING, CheckpointRow, ModelRow, SessionRow
from workers.queue.journal import Journal, connect
from workers.queue.records import NewEntry
from workers.storage import LocalStorage, artifact_key


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def journal(valkey: Valkey, tmp_path: Path) -> Iterator[Journal]:
    redis = connect(valkey.url)
    redis.flushall()
    settings = replace(settings_for(tmp_path, valkey.url), client_gone_s=60.0)
    made = Journal(redis, LocalStorage(tmp_path / "store"), settings)
    made.open_run(RUN, "user_1")
    made.install_epoch(RUN, 1, "w@h", {})
    yield made
    redis.close()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    url = settings_for(tmp_path, "redis://unused").database_url
    migrate.upgrade(url)
    with closing(Database(url)) as found:
        add_run(found, RUN, {})
        yield found


@pytest.fixture
def session_id(db: Database) -> str:
    with db.reading() as session:
        user_id = session.scalar(select(RunRow.user_id))
    assert user_id is not None
    found = sessions.create(db, user_id, {})
    with db.writing() as session:
        row = ModelRow(
            model_id=f"{found}:train:0", session_id=found, number=0, run_id=RUN, digest="d"
        )
        session.add(row)
    return found


def last_heard(db: Database, session_id: str, seconds_ago: float) -> None:
    at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    with db.writing() as session:
        mine = SessionRow.session_id == session_id
        session.execute(update(SessionRow).where(mine).values(seen_at=at))


def row_of(db: Database, session_id: str) -> SessionRow:
    with db.reading() as session:
        found = session.scalar(select(SessionRow).where(SessionRow.session_id == session_id))
    assert found is not None
    return found


def head(journal: Journal) -> Any:
    found = journal.head(RUN)
    assert found is not None
    return found


def test_who_is_there_keeps_the_device(db: Database, journal: Journal, session_id: str) -> None:
    sweeping.sweep(db, journal)
    last_heard(db, session_id, 50)
    sweeping.sweep(db, journal)
    assert head(journal).hold == "" and not row_of(db, session_id).parked


def test_who_vanishes_is_paused_once_what_was_queued_is_done(
    db: Database, journal: Journal, session_id: str
) -> None:
    journal.append(RUN, [NewEntry("forward_backward", b"x")])
    last_heard(db, session_id, 70)
    sweeping.sweep(db, journal)
    assert head(journal).hold == "" and not row_of(db, session_id).parked
    journal.cancel(RUN, 1)
    assert journal.take(RUN, 1) is None
    sweeping.sweep(db, journal)
    assert (head(journal).hold, head(journal).hold_info) == ("paused", {"reason": "idle"})
    assert row_of(db, session_id).parked
    # It comes back: what it sends resumes the run.
    assert sessions.beat(db, row_of(db, session_id).user_id, session_id)
    journal.append(RUN, [NewEntry("optim_step", b"x")])
    assert head(journal).hold == "" and not row_of(db, session_id).parked


def test_who_stays_away_has_its_runs_completed(
    db: Database, journal: Journal, session_id: str
) -> None:
    last_heard(db, session_id, 70)
    sweeping.sweep(db, journal)
    journal.detached(RUN, 1)
    sweeping.sweep(db, journal)
    assert head(journal).closed == ""
    last_heard(db, session_id, journal.settings.result_ttl_s + 1)
    sweeping.sweep(db, journal)
    assert head(journal).closed == "completed"
    ended = row_of(db, session_id)
    assert ended.finished_at is not None and ended.finish == {
        "reason": "interrupted",
        "detail": "vanished",
    }


def test_the_longest_vanished_makes_room(db: Database, journal: Journal, session_id: str) -> None:
    user_id = row_of(db, session_id).user_id
    assert not sweeping.end_oldest(db, journal, user_id)
    last_heard(db, session_id, 70)
    sweeping.sweep(db, journal)
    journal.detached(RUN, 1)
    assert sweeping.end_oldest(db, journal, user_id)
    assert head(journal).closed == "completed"
    assert not sweeping.end_oldest(db, journal, user_id)


def add_checkpoint(
    db: Database,
    journal: Journal,
    seq: int,
    kind: str,
    name: str,
    *,
    stored: bool = True,
    **more: Any,
) -> None:
    artifact = f"a{seq}"
    if stored:
        journal.storage.write(f"{artifact_key(RUN, artifact)}/manifest.json", b"{}")
    with db.writing() as session:
        session.add(
            CheckpointRow(run_id=RUN, kind=kind, name=name, seq=seq, artifact=artifact, **more)
        )


def left(db: Database, journal: Journal) -> list[int]:
    """The seqs of the checkpoints that are noted; what is not is not stored either."""
    with db.reading() as session:
        rows = list(session.scalars(select(CheckpointRow).order_by(CheckpointRow.seq)))
    names = {f"a{row.seq}" for row in rows}
    files = journal.storage.list(artifact_key(RUN))
    assert {file.key.split("/")[-2] for file in files} <= names
    return [row.seq for row in rows]


def test_what_has_expired_goes(db: Database, journal: Journal, session_id: str) -> None:
    now = datetime.now(UTC)
    add_checkpoint(db, journal, 1, TRAINING, "a", expires_at=now - timedelta(seconds=1))
    add_checkpoint(db, journal, 2, SAMPLER, "a", expires_at=now + timedelta(hours=1))
    add_checkpoint(db, journal, 3, TRAINING, "b")
    sweeping.sweep(db, journal)
    assert left(db, journal) == [2, 3]


def test_what_was_overwritten_goes_once_the_newer_one_is_there(
    db: Database, journal: Journal, session_id: str
) -> None:
    add_checkpoint(db, journal, 1, TRAINING, "a")
    add_checkpoint(db, journal, 2, TRAINING, "a", stored=False)
    # A sampling session may be pinned to either of these.
    add_checkpoint(db, journal, 3, SAMPLER, "a")
    add_checkpoint(db, journal, 4, SAMPLER, "a")
    sweeping.sweep(db, journal)
    assert left(db, journal) == [1, 2, 3, 4]
    journal.storage.write(f"{artifact_key(RUN, 'a2')}/manifest.json", b"{}")
    sweeping.sweep(db, journal)
    assert left(db, journal) == [2, 3, 4]


def test_of_weights_without_a_name_the_newest_stay(
    db: Database, journal: Journal, session_id: str
) -> None:
    for seq in range(1, sweeping.LIVE_KEPT + 4):
        add_checkpoint(db, journal, seq, LIVE, f"s{seq}")
    sweeping.sweep(db, journal)
    assert left(db, journal) == list(range(4, sweeping.LIVE_KEPT + 4))
