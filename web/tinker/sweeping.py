"""What happens by itself: clients that vanish, checkpoints whose time is over. No Flask.

A client says every ten seconds that it is there. One that has not for `client_gone_s` has its runs paused,
with a snapshot, once what it had queued is done: their device is free, and what a client sends that comes
back resumes them. After `result_ttl_s` its session is over. The projector calls `sweep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import func, select, update

from gpu_pool.database import Database, utc_now
from web.artifacts import service as artifacts
from web.runs.service import close_row
from web.tinker.tables import LIVE, TRAINING, CheckpointRow, ModelRow, SessionRow
from workers.queue.journal import Journal
from workers.storage import Storage, artifact_key
from workers.storage.protocol import MANIFEST

# Of the weights that were saved for sampling sessions without a name, so many of each model stay.
LIVE_KEPT = 32
_BATCH = 200


def sweep(db: Database, journal: Journal) -> None:
    """One look. Raises RedisError, OSError or SQLAlchemyError: the next look goes on."""
    for session_id in _unheard(db, journal.settings.client_gone_s, parked=False):
        if _park(db, journal, session_id):
            _set(db, session_id, parked=True)
    for session_id in _unheard(db, journal.settings.result_ttl_s, parked=True):
        end(db, journal, session_id)
    for row in (*_expired(db), *_replaced(db, journal.storage), *_old_live(db)):
        artifacts.erase(db, journal.storage, row.run_id, row.artifact)
        with db.writing() as session:
            session.delete(session.get_one(CheckpointRow, row.id))


def end(db: Database, journal: Journal, session_id: str) -> None:
    """The end of a session whose client has vanished: its runs are completed where they stand."""
    for run_id in _runs(db, session_id):
        head = journal.head(run_id)
        if head is not None and not head.closed and not head.worker:
            journal.close(run_id, "completed")
            with db.writing() as session:
                now = session.scalar(select(utc_now()))
                assert now is not None
                close_row(session, run_id, "completed", None, now)
    finish = {"reason": "interrupted", "detail": "vanished"}
    _set(db, session_id, finished_at=utc_now(), finish=finish)


def end_oldest(db: Database, journal: Journal, user_id: str) -> bool:
    """End the vanished session of a user that has been unheard for longest; False when there is none."""
    query = (
        select(SessionRow.session_id)
        .join(ModelRow, ModelRow.session_id == SessionRow.session_id)
        .where(SessionRow.user_id == user_id, SessionRow.parked, SessionRow.finished_at.is_(None))
        .order_by(SessionRow.seen_at)
        .limit(1)
    )
    with db.reading() as session:
        found = session.scalar(query)
    if found is not None:
        end(db, journal, found)
    return found is not None


def _unheard(db: Database, seconds: float, *, parked: bool) -> list[str]:
    with db.reading() as session:
        now = session.scalar(select(utc_now()))
        assert isinstance(now, datetime)
        query = select(SessionRow.session_id).where(
            SessionRow.seen_at < now - timedelta(seconds=seconds),
            SessionRow.finished_at.is_(None),
            SessionRow.parked.is_(parked),
        )
        return list(session.scalars(query.limit(_BATCH)))


def _park(db: Database, journal: Journal, session_id: str) -> bool:
    """Whether all of its runs stand still."""
    done = True
    for run_id in _runs(db, session_id):
        head = journal.head(run_id)
        if head is None or head.closed or head.hold:
            continue
        if head.waits:
            done = False
        else:
            journal.hold(run_id, "paused", {"reason": "idle"})
    return done


def _runs(db: Database, session_id: str) -> list[str]:
    with db.reading() as session:
        return list(
            session.scalars(select(ModelRow.run_id).where(ModelRow.session_id == session_id))
        )


def _set(db: Database, session_id: str, **values: object) -> None:
    with db.writing() as session:
        mine = SessionRow.session_id == session_id
        session.execute(update(SessionRow).where(mine).values(**values))


def _expired(db: Database) -> list[CheckpointRow]:
    query = select(CheckpointRow).where(CheckpointRow.expires_at < utc_now()).limit(_BATCH)
    with db.reading() as session:
        return list(session.scalars(query))


def _replaced(db: Database, storage: Storage) -> Iterator[CheckpointRow]:
    """What was overwritten under its name by a newer one that is there."""
    key = (CheckpointRow.run_id, CheckpointRow.name)
    several = (
        select(*key)
        .where(CheckpointRow.kind == TRAINING)
        .group_by(*key)
        .having(func.count() > 1)
        .limit(_BATCH)
    )
    with db.reading() as session:
        for run_id, name in session.execute(several).all():
            mine = select(CheckpointRow).where(
                CheckpointRow.kind == TRAINING,
                CheckpointRow.run_id == run_id,
                CheckpointRow.name == name,
            )
            rows = list(session.scalars(mine.order_by(CheckpointRow.id.desc())))
            there = (at for at, row in enumerate(rows) if _is_stored(storage, row))
            yield from rows[next(there, len(rows)) + 1 :]


def _is_stored(storage: Storage, row: CheckpointRow) -> bool:
    return storage.stat(f"{artifact_key(row.run_id, row.artifact)}/{MANIFEST}") is not None


def _old_live(db: Database) -> Iterator[CheckpointRow]:
    """Of what was saved without a name, all but the newest of each model."""
    is_live = CheckpointRow.kind == LIVE
    many = (
        select(CheckpointRow.run_id)
        .where(is_live)
        .group_by(CheckpointRow.run_id)
        .having(func.count() > LIVE_KEPT)
        .limit(_BATCH)
    )
    with db.reading() as session:
        for run_id in list(session.scalars(many)):
            mine = select(CheckpointRow).where(is_live, CheckpointRow.run_id == run_id)
            newest_first = mine.order_by(CheckpointRow.id.desc())
            yield from session.scalars(newest_first.offset(LIVE_KEPT).limit(_BATCH))
