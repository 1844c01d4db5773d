"""How far each projection has come, and which deletions have still left traces in files."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime, utc_now


class ProjectionRow(Base):
    """A reader's position in its stream, written in the transaction that holds what it read."""

    __tablename__ = "projections"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    position: Mapped[str] = mapped_column(String(64))


class ErasureRow(Base):
    """A deletion, written in its transaction and taken away once its traces are gone from the files."""

    __tablename__ = "erasures"

    id: Mapped[int] = mapped_column(primary_key=True)
    asked_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
