"""The SQL basis: times are aware and UTC, writers wait for each other, readers for nobody."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, StatementError

from gpu_pool.database import Database, utc_now
from gpu_pool.tables import UP, Host, SlotRow


def test_the_databases_clock_is_aware(database: Database) -> None:
    with database.reading() as session:
        now = session.scalar(select(utc_now()))
    assert now is not None
    assert now.tzinfo is UTC
    assert abs(datetime.now(UTC) - now) < timedelta(seconds=5)


def test_times_come_back_as_the_same_instant(database: Database) -> None:
    at = datetime(2026, 11, 23, 12, 0, 0, 123456, timezone(timedelta(hours=2)))
    with database.writing() as session:
        session.add(Host(name="a", state=UP, started_at=at))
    with database.reading() as session:
        stored = session.scalar(select(Host.started_at))
    assert stored == at
    assert stored.tzinfo is UTC


def test_a_time_without_a_zone_is_refused(database: Database) -> None:
    row = Host(name="a", state=UP, started_at=datetime(2026, 1, 1))
    with pytest.raises(StatementError, match="without a zone"), database.writing() as session:
        session.add(row)


def test_an_exception_undoes_everything(database: Database) -> None:
    def add_and_fail() -> None:
        with database.writing() as session:
            session.add(Host(name="a", state=UP))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_fail()
    with database.reading() as session:
        assert session.scalars(select(Host)).all() == []


def test_foreign_keys_hold(database: Database) -> None:
    row = SlotRow(
        host="nowhere", name="cpu0", kind="cpu", device_name="", memory_bytes=1, threads=1,
        present=True,
    )  # fmt: skip
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(row)


def test_it_survives_a_kill_and_lets_readers_be(database: Database) -> None:
    with database.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA synchronous")) == 2


def test_a_writer_waits_for_another_and_a_reader_does_not(database: Database) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with database.writing() as session:
            session.add(Host(name="a", state=UP))
            session.flush()
            held.set()
            release.wait(10)

    writer = threading.Thread(target=hold)
    writer.start()
    assert held.wait(10)
    with database.reading() as session:
        assert session.scalars(select(Host)).all() == []
    threading.Timer(0.2, release.set).start()
    began = time.monotonic()
    with database.writing() as session:
        # Read, then write, after another writer: the case in which SQLite would give up at once.
        assert [host.name for host in session.scalars(select(Host))] == ["a"]
        session.add(Host(name="b", state=UP))
    assert time.monotonic() - began > 0.1
    writer.join()
