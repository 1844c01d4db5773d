"""Users and keys: making them, revoking them, finding who a key belongs to. No Flask."""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gpu_pool.database import Database, utc_now
from web.accounts import keys
from web.accounts.tables import ApiKeyRow, UserRow

USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
# How old `last_used_at` may be: it is written once per such time, not once per request.
USED_STEP = timedelta(minutes=10)


@dataclass(frozen=True)
class User:
    """Who asks."""

    id: str
    name: str


@dataclass(frozen=True)
class Key:
    """A key, as far as it may be shown."""

    id: str
    user: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


def create_user(db: Database, name: str) -> User:
    """The user of this name, made when there is none. Raises ValueError for a bad name."""
    if not USER_NAME.fullmatch(name):
        raise ValueError(
            f"not a user name: {name!r}; 1 to 64 of A-Z a-z 0-9 . _ @ -, beginning with a letter or digit"
        )
    try:
        with db.writing() as session:
            row = _user(session, name)
            if row is None:
                row = UserRow(id=f"user_{secrets.token_hex(6)}", name=name)
                session.add(row)
            return User(row.id, row.name)
    except IntegrityError:
        # Another process made the same user in between.
        return create_user(db, name)


def create_key(db: Database, user_name: str) -> tuple[User, str]:
    """A new key for the user of this name (made when there is none), and the key's text."""
    user = create_user(db, user_name)
    key = keys.new_key()
    with db.writing() as session:
        session.add(ApiKeyRow(public_id=key.public_id, user_id=user.id, digest=key.digest))
    return user, key.text


def revoke_key(db: Database, public_id: str) -> bool:
    """Make a key useless (within the ten seconds of the web processes' caches); False if unknown."""
    with db.writing() as session:
        row = session.get(ApiKeyRow, public_id)
        if row is not None and row.revoked_at is None:
            row.revoked_at = session.scalar(select(utc_now()))
        return row is not None


def list_keys(db: Database) -> list[Key]:
    """All keys, revoked ones too, oldest first."""
    found = select(ApiKeyRow, UserRow.name).join(UserRow, UserRow.id == ApiKeyRow.user_id)
    with db.reading() as session:
        rows = session.execute(found.order_by(ApiKeyRow.created_at, ApiKeyRow.public_id))
        return [
            Key(row.public_id, name, row.created_at, row.last_used_at, row.revoked_at)
            for row, name in rows
        ]


def user_of_key(db: Database, text: str) -> User | None:
    """The owner of a well-formed key; None when there is no such key or it is revoked."""
    public_id = keys.public_id(text)
    if public_id is None:
        return None
    with db.reading() as session:
        row = session.get(ApiKeyRow, public_id)
        stored = row.digest if row is not None else keys.digest("")
        if not hmac.compare_digest(stored, keys.digest(text)) or row is None or row.revoked_at:
            return None
        owner = session.get_one(UserRow, row.user_id)
        return User(owner.id, owner.name)


def mark_used(db: Database, text: str) -> None:
    """Note that a key is in use, at most once per `USED_STEP`."""
    public_id = keys.public_id(text)
    with db.writing() as session:
        now = session.scalar(select(utc_now()))
        assert now is not None
        old = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < now - USED_STEP)
        session.execute(
            update(ApiKeyRow).where(ApiKeyRow.public_id == public_id, old).values(last_used_at=now)
        )


def _user(session: Session, name: str) -> UserRow | None:
    return session.scalar(select(UserRow).where(UserRow.name == name))
