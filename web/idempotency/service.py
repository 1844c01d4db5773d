"""Claims on idempotency keys. No Flask.

A claim is a row without an answer. Its maker answers and stores the answer, or gives the claim back
when the request failed (a failed request changed nothing, so a repeat may try again). A claim whose
maker died is taken over after a while, with the same token, so that what it made is not made twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gpu_pool.database import Database, utc_now
from schemas.errors import SignalError
from web.idempotency.tables import IdempotencyRow

KEEP = timedelta(hours=24)
ABANDONED = timedelta(seconds=90)
PATIENCE_S = 5.0
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Claim:
    """The right to answer (`answer` is None), or the first answer: status and body."""

    token: str
    answer: tuple[int, bytes] | None = None


def request_digest(method: str, path: str, body: Any) -> str:
    """The identity of a request: method, path and the body with its keys in order."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(f"{method} {path}\n{canonical}".encode()).hexdigest()


class IdempotencyKeys:
    """The keys of all users."""

    def __init__(self, db: Database, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` is called between looks at a claim of another request."""
        self._db, self._sleep = db, sleep

    def claim(self, user_id: str, key: str, digest: str, run_id: str | None = None) -> Claim:
        """Take the key, or get the first answer. `run_id` is the run that the request is about.

        Raises SignalError: idempotency_conflict when the key stood for another request,
        request_in_progress when the first is still being answered after a short wait.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            claim = self._try(user_id, key, digest, run_id)
            if claim is not None:
                return claim
            if time.monotonic() > deadline:
                raise SignalError("request_in_progress")
            self._sleep(_LOOK_AGAIN_S)

    def store(self, user_id: str, key: str, status: int, body: bytes) -> None:
        """Keep the answer of a claim."""
        with self._db.writing() as session:
            row = session.get(IdempotencyRow, (user_id, key))
            if row is not None:
                row.status, row.body = status, body

    def give_back(self, user_id: str, key: str) -> None:
        """Forget a claim whose request failed."""
        with self._db.writing() as session:
            session.execute(
                delete(IdempotencyRow).where(
                    IdempotencyRow.user_id == user_id,
                    IdempotencyRow.key == key,
                    IdempotencyRow.status.is_(None),
                )
            )

    def forget_old(self) -> None:
        """Delete what was kept for its time."""
        with self._db.writing() as session:
            now = session.scalar(select(utc_now())) or datetime.now(UTC)
            old = IdempotencyRow.claimed_at < now - KEEP
            session.execute(delete(IdempotencyRow).where(old))

    def _try(self, user_id: str, key: str, digest: str, run_id: str | None) -> Claim | None:
        try:
            with self._db.writing() as session:
                row = session.get(IdempotencyRow, (user_id, key))
                now = session.scalar(select(utc_now())) or datetime.now(UTC)
                if row is None or now - row.claimed_at > KEEP:
                    token = secrets.token_hex(8)
                    fresh = IdempotencyRow(
                        user_id=user_id,
                        key=key,
                        digest=digest,
                        token=token,
                        run_id=run_id,
                        status=None,
                        body=None,
                        claimed_at=now,
                    )
                    session.merge(fresh)
                    return Claim(token)
                if row.digest != digest:
                    raise SignalError("idempotency_conflict")
                if row.status is not None:
                    return Claim(row.token, (row.status, row.body or b""))
                if now - row.claimed_at > ABANDONED:
                    row.claimed_at = now
                    return Claim(row.token)
                return None
        except IntegrityError:
            # Another request with the same key was faster by a moment.
            return None


def forget(session: Session, run_id: str) -> None:
    """Delete the answers that are about a run, the one to the request that made it among them."""
    made_it = IdempotencyRow.token == run_id.removeprefix("run_")
    session.execute(delete(IdempotencyRow).where(or_(IdempotencyRow.run_id == run_id, made_it)))
