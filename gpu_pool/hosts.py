"""Hosts and their slots in SQL: an agent registers its host, renews it, and takes it down.

Every function runs inside the caller's transaction, of a session of `Database.writing()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from gpu_pool.database import utc_now
from gpu_pool.devices import Slot
from gpu_pool.tables import DOWN, UP, Host, LeaseRow, SlotRow


def register(session: Session, host: str, slots: Sequence[Slot]) -> None:
    """Makes the host known with exactly these slots; slots that are gone take no more leases."""
    if session.get(Host, host) is None:
        session.add(Host(name=host, state=UP))
        session.flush()
    session.execute(
        update(Host)
        .where(Host.name == host)
        .values(state=UP, started_at=utc_now(), heartbeat_at=utc_now())
    )
    known = {row.name: row for row in session.scalars(select(SlotRow).where(SlotRow.host == host))}
    for row in known.values():
        row.present = False
    for slot in slots:
        row = known.get(slot.name) or SlotRow(host=host, name=slot.name)
        row.kind, row.device_name, row.uuid = slot.kind, slot.device_name, slot.uuid
        row.memory_bytes, row.threads, row.present = slot.memory_bytes, slot.threads, True
        session.add(row)


def take_down(session: Session, host: str) -> None:
    """Marks the host as stopped; its slots take no leases until its agent registers again."""
    session.execute(update(Host).where(Host.name == host).values(state=DOWN))


def renew(session: Session, host: str) -> None:
    """The agent's sign of life: marks the host as up and renews every lease that it holds."""
    session.execute(update(Host).where(Host.name == host).values(state=UP, heartbeat_at=utc_now()))
    slots = select(SlotRow.id).where(SlotRow.host == host)
    session.execute(
        update(LeaseRow)
        .where(LeaseRow.slot_id.in_(slots), LeaseRow.released_at.is_(None))
        .values(renewed_at=utc_now())
    )


def heartbeats(session: Session) -> dict[str, datetime | None]:
    """When every host last showed a sign of life; None for one that was stopped."""
    rows = session.scalars(select(Host))
    return {row.name: row.heartbeat_at if row.state == UP else None for row in rows}
