"""The projector and the scrubbing of files, on a real Redis-protocol server and a real database file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gpu_pool.database import Database
from tests.support.valkey import Valkey, running_valkey, settings_for
from tests.unit.web.test_projector import RUN, add_run
from web import migrate
from web.db import scrub as scrubbing
from web.db.scrub import scrub
from web.db.tables import ErasureRow
from web.events import service as events
from web.projector import LOCK, Projector
from web.runs.service import forget
from web.runs.tables import RunRow
from workers.queue import keys
from workers.queue.journal import connect

MARK = "zebra-quagga-okapi"


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    folder = tmp_path / "redis"
    folder.mkdir()
    with running_valkey(folder) as server:
        yield server


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    url = settings_for(tmp_path, "redis://unused").database_url
    migrate.upgrade(url)
    with closing(Database(url)) as found:
        add_run(found, RUN, {"a": MARK})
        yield found


@pytest.fixture
def redis(valkey: Valkey) -> Iterator[Any]:
    with closing(connect(valkey.url)) as found:
        yield found


def event(redis: Any, type_: str, place: str = "*", **fields: str) -> None:
    row = {"type": type_, "run": RUN, "at": "1700000000.5", "data": "{}", **fields}
    redis.xadd(keys.COMMITS, row, id=place)


def kinds(db: Database) -> list[str]:
    page = events.page(db, RUN, 0, 100)
    assert page is not None
    return [row.type for row in page.events]


def test_who_waits_is_woken_when_the_event_is_in_sql(redis: Any, db: Database) -> None:
    pubsub = redis.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(keys.DONE)
    pubsub.get_message(timeout=1)
    projector = Projector(redis, db)
    event(redis, "commit", seq="1", entry="1", kind="sample", status="completed")
    assert projector.step() == 1
    assert pubsub.get_message(timeout=0.2) is None, "operations wake by themselves"
    event(redis, "ready")
    assert projector.step() == 1
    message = pubsub.get_message(timeout=1)
    assert message["data"] == f"{RUN}:{events.HAPPENED}".encode()
    assert kinds(db) == ["ready"]
    pubsub.close()


def test_a_server_whose_clock_went_back_is_read_from_its_beginning(
    redis: Any, db: Database
) -> None:
    projector = Projector(redis, db)
    event(redis, "placed", "2000-0", status="loading")
    assert projector.step() == 1
    redis.delete(keys.COMMITS)
    event(redis, "ready", "1000-0")
    assert projector.step() == 1
    assert kinds(db) == ["placed", "ready"]
    event(redis, "paused", "1000-1")
    projector.step()
    event(redis, "resumed", "3000-0")
    projector.step()
    assert kinds(db) == ["placed", "ready", "paused", "resumed"]


def test_what_was_read_before_is_written_once(redis: Any, db: Database) -> None:
    projector = Projector(redis, db)
    event(redis, "placed", "2000-0", status="loading")
    projector.step()
    redis.delete(keys.COMMITS)
    event(redis, "placed", "2000-0", status="loading")
    redis.delete(LOCK)
    with db.writing() as session:
        session.execute(RunRow.__table__.update().values(status="ready"))
    Projector(redis, db).step()
    assert kinds(db) == ["placed"]
    with db.reading() as session:
        assert session.scalar(select(RunRow.status)) == "ready"


def holders(folder: Path) -> list[str]:
    """The files below a folder that hold the mark."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if MARK.encode() in path.read_bytes()]


def test_what_was_deleted_is_scrubbed_from_the_files(
    tmp_path: Path, redis: Any, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "EMPTY_LOG_S", 0.3)
    redis.set("a", MARK)
    redis.delete("a")
    assert scrub(db, redis), "nothing is noted, so nothing is done"
    assert len(holders(tmp_path)) >= 2
    with db.writing() as session:
        forget(session, RUN)
        session.add(ErasureRow())
    with db.reading() as session:
        session.execute(select(RunRow)).all()
        assert not scrub(db, redis), "somebody still reads what was there before"
    assert scrub(db, redis)
    assert holders(tmp_path) == []
    with db.reading() as later:
        assert later.scalars(select(ErasureRow)).all() == []


def test_what_cannot_be_scrubbed_now_stays_noted(valkey: Valkey, redis: Any, db: Database) -> None:
    with db.writing() as session:
        session.add(ErasureRow())
    valkey.kill()
    assert not scrub(db, redis)
    with db.reading() as session:
        assert len(session.scalars(select(ErasureRow)).all()) == 1
    valkey.start()
    assert scrub(db, redis)
