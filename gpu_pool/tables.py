"""The pool's tables: hosts, their slots, requests of runs for a device, and leases.

Only `gpu_pool.leases` reads and writes them. A run is named by its id alone: the table of runs
belongs to the web tier.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base, UtcDateTime, utc_now

# What a request waits for: queued, a slot; paused, its owner. One whose run has ended is closing while
# it holds a lease, then withdrawn until an agent has cleared away what the run left in Redis.
QUEUED, LEASED, PAUSED = "queued", "leased", "paused"
CLOSING, WITHDRAWN, ENDED = "closing", "withdrawn", "ended"
UP, DOWN = "up", "down"

_OPEN = text("released_at IS NULL")
_WHILE_OPEN: dict[str, Any] = {"sqlite_where": _OPEN, "postgresql_where": _OPEN}


class Host(Base):
    """A machine whose agent has registered itself."""

    __tablename__ = "hosts"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())


class SlotRow(Base):
    """A device, or a share of the CPUs, that one worker can be pinned to."""

    __tablename__ = "slots"
    __table_args__ = (UniqueConstraint("host", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(ForeignKey("hosts.name"))
    name: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    device_name: Mapped[str] = mapped_column(String(255))
    uuid: Mapped[str | None] = mapped_column(String(96))
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    threads: Mapped[int]
    # A slot that is no longer there keeps its row, because old leases name it.
    present: Mapped[bool]


class LeaseRequest(Base):
    """A run's wish for a device. It outlives its leases, because it counts the run's epochs.

    `id` is the place in the queue: the oldest request is served first, so a run that loses its worker
    comes before all that never had one.
    """

    __tablename__ = "lease_requests"
    __table_args__ = (Index(None, "state", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    epoch: Mapped[int] = mapped_column(default=0)
    requirements: Mapped[dict[str, Any]] = mapped_column(JSON)
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    # The last seq of the run that SQL knows of: a journal that is behind it has lost commits.
    known_seq: Mapped[int] = mapped_column(BigInteger, default=0)


class LeaseRow(Base):
    """One run on one slot, from grant to release. The database itself refuses a run's second open one; a slot
    has one for every run that its worker holds."""

    __tablename__ = "leases"
    __table_args__ = (
        Index("ix_leases_open_slot", "slot_id", **_WHILE_OPEN),
        Index("uq_leases_open_run", "run_id", unique=True, **_WHILE_OPEN),
        UniqueConstraint("run_id", "epoch"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("lease_requests.run_id"))
    slot_id: Mapped[int] = mapped_column(ForeignKey("slots.id"))
    epoch: Mapped[int]
    granted_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    renewed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now())
    released_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    reason: Mapped[str | None] = mapped_column(String(64))
