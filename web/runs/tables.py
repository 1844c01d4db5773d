"""Tables of runs and their labels.

The journal is the truth about operations; what is here is what a run was asked to be, and what the
projector has read from the stream of commits so far.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime, utc_now


class RunRow(Base):
    """A run. `id` is its place in lists, newest last."""

    __tablename__ = "runs"
    __table_args__ = (Index(None, "user_id", "id"), Index(None, "user_id", "status"))

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(String(32), unique=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str | None] = mapped_column(String(200))
    base_model: Mapped[str] = mapped_column(String(200))
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    device: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    current_step: Mapped[int] = mapped_column(default=0)
    # The run that this one began from; it may have been deleted since.
    parent: Mapped[str | None] = mapped_column(String(32), index=True)
    # What the worker is told to begin from: `run_id` with `seq` or `artifact` (gpu_pool's requirements).
    origin: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    # Of a completed run: the hashes of its last state.
    certificate: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    # The last seq of which metrics and artifacts are in SQL.
    projected_seq: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class RunLabelRow(Base):
    """One label of a run, for the filter of lists."""

    __tablename__ = "run_labels"
    __table_args__ = (Index(None, "name", "value"),)

    run: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(String(256))
