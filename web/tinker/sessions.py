"""Sessions: a client that says every ten seconds that it is there. No Flask."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from gpu_pool.database import Database, utc_now
from schemas.errors import SignalError
from web.tinker.tables import ModelRow, SamplerRow, SessionRow

NO_SESSION = "There is no such session, or it is not yours."


def create(db: Database, user_id: str, about: Mapping[str, Any], name: str | None = None) -> str:
    """A new session's id; one of this `name` (16 hex digits) is made once."""
    session_id = f"ses_{name or secrets.token_hex(8)}"
    with db.writing() as session:
        if _find(session, session_id) is None:
            session.add(SessionRow(session_id=session_id, user_id=user_id, about=dict(about)))
    return session_id


def own(db: Database, user_id: str, session_id: str) -> SessionRow:
    """The user's session. Raises SignalError not_found."""
    with db.reading() as session:
        row = _find(session, session_id)
    if row is None or row.user_id != user_id:
        raise SignalError("not_found", NO_SESSION, param="session_id")
    return row


def open_session(db: Database, user_id: str, session_id: str) -> SessionRow:
    """The user's session, which may still make things. Raises SignalError not_found or bad_request."""
    row = own(db, user_id, session_id)
    if row.finished_at is not None:
        text = "The session is finished: make a new ServiceClient."
        raise SignalError("bad_request", text, param="session_id")
    return row


def beat(db: Database, user_id: str, session_id: str) -> bool:
    """Note that its client is there; False once it is finished. Raises SignalError not_found."""
    row = own(db, user_id, session_id)
    if row.finished_at is not None:
        return False
    with db.writing() as session:
        session.execute(
            update(SessionRow)
            .where(SessionRow.session_id == session_id)
            .values(seen_at=utc_now(), parked=False)
        )
    return True


def finish(db: Database, user_id: str, session_id: str, reason: Mapping[str, Any]) -> bool:
    """Note how it ended; False when it had ended before. Raises SignalError not_found."""
    own(db, user_id, session_id)
    with db.writing() as session:
        ended = session.execute(
            update(SessionRow)
            .where(SessionRow.session_id == session_id, SessionRow.finished_at.is_(None))
            .values(finished_at=utc_now(), finish=dict(reason))
            .returning(SessionRow.id)
        )
        return ended.first() is not None


def set_about(db: Database, session_id: str, **facts: Any) -> None:
    """Change what a session says of itself."""
    with db.writing() as session:
        row = _find(session, session_id)
        if row is not None:
            row.about = {**row.about, **facts}


def page(db: Database, user_id: str, offset: int, limit: int) -> Sequence[SessionRow]:
    """A user's sessions, newest first."""
    query = select(SessionRow).where(SessionRow.user_id == user_id).order_by(SessionRow.id.desc())
    with db.reading() as session:
        return list(session.scalars(query.offset(offset).limit(limit)))


def models_of(db: Database, session_id: str) -> list[ModelRow]:
    """The session's models, and the runs that only sample for it (without a number)."""
    query = select(ModelRow).where(ModelRow.session_id == session_id).order_by(ModelRow.id)
    with db.reading() as session:
        return list(session.scalars(query))


def samplers_of(db: Database, session_id: str) -> list[str]:
    """The ids of the session's sampling sessions."""
    query = select(SamplerRow.sampler_id).where(SamplerRow.session_id == session_id)
    with db.reading() as session:
        return list(session.scalars(query.order_by(SamplerRow.id)))


def count(db: Database, user_id: str) -> int:
    """How many sessions a user has had."""
    query = select(func.count()).where(SessionRow.user_id == user_id)
    with db.reading() as session:
        return session.scalar(query) or 0


def _find(session: Session, session_id: str) -> SessionRow | None:
    if not session_id.isprintable():
        return None
    return session.scalar(select(SessionRow).where(SessionRow.session_id == session_id))
