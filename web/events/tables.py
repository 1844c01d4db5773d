"""The table of events."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime

_BIG = BigInteger().with_variant(Integer(), "sqlite")


class RunEventRow(Base):
    """Something that happened to a run. `id` is its place in the run's list, and the cursor."""

    __tablename__ = "run_events"
    __table_args__ = (Index(None, "run", "id"),)

    id: Mapped[int] = mapped_column(_BIG, primary_key=True)
    run: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    type: Mapped[str] = mapped_column(String(32))
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    # The entry of the stream of commits that it was read from: it is written once.
    stream_id: Mapped[str] = mapped_column(String(40), unique=True)
