"""The table of metrics."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime

_BIG = BigInteger().with_variant(Integer(), "sqlite")


class MetricRow(Base):
    """One row of a run's series: an operation's numbers (`seq` is set) or the user's."""

    __tablename__ = "metrics"
    __table_args__ = (UniqueConstraint("run_id", "seq"), Index(None, "run_id", "id"))

    id: Mapped[int] = mapped_column(_BIG, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    seq: Mapped[int | None] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(BigInteger)
    source: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str | None] = mapped_column(String(32))
    numbers: Mapped[dict[str, float]] = mapped_column(JSON)
    # Of a user's row: what a repeat under the same Idempotency-Key carries again.
    token: Mapped[str | None] = mapped_column(String(32), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
