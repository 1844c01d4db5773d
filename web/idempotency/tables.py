"""The table of answered POST requests that carried an Idempotency-Key."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime, utc_now


class IdempotencyRow(Base):
    """A key of a user: which request it stood for and, once there is one, the answer."""

    __tablename__ = "idempotency_keys"

    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    # Names what the request makes, so that a repeat after a crash makes the same thing again.
    token: Mapped[str] = mapped_column(String(32))
    # The run that the request was about: its answers go when the run is deleted.
    run_id: Mapped[str | None] = mapped_column(String(32), index=True)
    status: Mapped[int | None]
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    claimed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now(), index=True)
