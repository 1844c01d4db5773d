"""Tables of what the SDK calls sessions, models, sampling sessions and checkpoints.

A model is a run; what it does is in the run's journal. A checkpoint is an artifact of the run.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime, utc_now

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_JSON = JSON(none_as_null=True)
# Kinds of checkpoints; the last has no name and is for one sampling session.
TRAINING, SAMPLER, EXTERNAL, LIVE = "weights", "sampler_weights", "external_weights", "live"


class SessionRow(Base):
    """A client: what it says of itself, and when it was last heard of."""

    __tablename__ = "tinker_sessions"

    id: Mapped[int] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(String(40), unique=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    about: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now(), index=True)
    # Whether its runs have been paused since it was last heard of.
    parked: Mapped[bool] = mapped_column(default=False)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finish: Mapped[dict[str, Any] | None] = mapped_column(_JSON)


class ModelRow(Base):
    """A model of a session; `number` is None of a run that only samples for it."""

    __tablename__ = "tinker_models"
    __table_args__ = (Index(None, "session_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(String(80), unique=True)
    session_id: Mapped[str] = mapped_column(ForeignKey("tinker_sessions.session_id"))
    number: Mapped[int | None]
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    loaded_from: Mapped[str | None] = mapped_column(String(300))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())


class SamplerRow(Base):
    """A sampling session: the run whose worker samples, and the weights that it is pinned to."""

    __tablename__ = "tinker_samplers"

    id: Mapped[int] = mapped_column(primary_key=True)
    sampler_id: Mapped[str] = mapped_column(String(80), unique=True)
    session_id: Mapped[str] = mapped_column(ForeignKey("tinker_sessions.session_id"), index=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), index=True)
    base_model: Mapped[str] = mapped_column(String(200))
    model_path: Mapped[str | None] = mapped_column(String(300))
    # `source`, and for a saved state `run_id` and `artifact`.
    weights: Mapped[dict[str, Any]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())


class CheckpointRow(Base):
    """A name for an artifact that the operation at `seq` of the model's lane saves, or has saved."""

    __tablename__ = "tinker_checkpoints"
    __table_args__ = (
        UniqueConstraint("run_id", "seq"),
        Index(None, "run_id", "kind", "name"),
    )

    id: Mapped[int] = mapped_column(_BIG, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(100))
    seq: Mapped[int] = mapped_column(BigInteger)
    artifact: Mapped[str] = mapped_column(String(100))
    sampler_id: Mapped[str | None] = mapped_column(String(80))
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    public: Mapped[bool] = mapped_column(default=False)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
