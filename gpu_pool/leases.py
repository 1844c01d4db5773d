"""Leases: which run holds which slot, and under which epoch. SQL only; no Redis, no processes.

The web tier files a request in the transaction that creates a run; the agent of a host grants it.
The grant raises the run's epoch in the same transaction, and nothing else ever does: a worker that
holds an older epoch is fenced out by the journal. All times are the database's.

Every function runs inside the caller's transaction; those that change anything need a session of
`Database.writing()`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from gpu_pool.database import utc_now
from gpu_pool.placement import FreeSlot, Request, Warmth, place
from gpu_pool.tables import (
    DOWN,
    ENDED,
    LEASED,
    QUEUED,
    UP,
    WITHDRAWN,
    Host,
    LeaseRequest,
    LeaseRow,
    SlotRow,
)

# How many of the oldest requests one grant looks at.
_WINDOW = 64


@dataclass(frozen=True)
class Lease:
    """An open lease as the agent sees it; `slot` is the slot's name on its host."""

    id: int
    run_id: str
    epoch: int
    host: str
    slot: str
    requirements: Mapping[str, Any]


@dataclass(frozen=True)
class WarmWorker:
    """What the agent knows of the worker on a slot, for the choice between free slots."""

    warmth: Warmth
    model: str | None = None


def request(session: Session, run_id: str, requirements: Mapping[str, Any]) -> None:
    """Queues a run for a device; a repeat changes nothing.

    `requirements`: `base_model` and `config` (handed to the worker as they are), and optionally
    `kind` ("cpu" or "cuda") and `memory_bytes`.
    """
    missing = {"base_model", "config"} - requirements.keys()
    if missing:
        raise ValueError(f"requirements lack {', '.join(sorted(missing))}")
    known = session.scalar(select(LeaseRequest.id).where(LeaseRequest.run_id == run_id))
    if known is None:
        session.add(LeaseRequest(run_id=run_id, state=QUEUED, requirements=dict(requirements)))


def withdraw(session: Session, run_id: str) -> bool:
    """Takes a queued run that has ended out of the queue; False when it was not waiting there.

    An agent then clears away what the run left in Redis, and calls `cleared`.
    """
    changed = session.execute(
        update(LeaseRequest)
        .where(LeaseRequest.run_id == run_id, LeaseRequest.state == QUEUED)
        .values(state=WITHDRAWN)
        .returning(LeaseRequest.id)
    )
    return changed.first() is not None


def withdrawn(session: Session) -> list[str]:
    """Runs that were withdrawn and are still to be cleared away."""
    waiting = select(LeaseRequest.run_id).where(LeaseRequest.state == WITHDRAWN)
    return list(session.scalars(waiting.order_by(LeaseRequest.id).limit(_WINDOW)))


def cleared(session: Session, run_ids: Collection[str]) -> None:
    """Notes that nothing is left to do for these runs."""
    session.execute(
        update(LeaseRequest)
        .where(LeaseRequest.run_id.in_(run_ids), LeaseRequest.state == WITHDRAWN)
        .values(state=ENDED)
    )


def queued(session: Session, limit: int = _WINDOW) -> list[str]:
    """The ids of the runs that wait for a slot, oldest first."""
    waiting = select(LeaseRequest.run_id).where(LeaseRequest.state == QUEUED)
    return list(session.scalars(waiting.order_by(LeaseRequest.id).limit(limit)))


def queue_position(session: Session, run_id: str) -> int | None:
    """How many runs wait before this one; None when it does not wait."""
    mine = select(LeaseRequest.id).where(
        LeaseRequest.run_id == run_id, LeaseRequest.state == QUEUED
    )
    place_in_queue = session.scalar(mine)
    if place_in_queue is None:
        return None
    before = select(func.count()).where(
        LeaseRequest.state == QUEUED, LeaseRequest.id < place_in_queue
    )
    return session.scalar(before) or 0


def acquire(
    session: Session,
    host: str,
    *,
    among: Collection[str] | None = None,
    warm: Mapping[str, WarmWorker] | None = None,
) -> Lease | None:
    """Grants a free slot of `host` to the oldest request that fits one; None when none does.

    `among` limits the requests to these runs and `warm` describes the workers by slot name. Other
    agents may grant at the same time: PostgreSQL skips the rows that they have locked, SQLite lets
    one writer in.
    """
    slots = {row.name: row for row in _free_slots(session, host)}
    requests = {row.run_id: row for row in _waiting(session, among)} if slots else {}
    choice = place(
        [_as_request(row) for row in requests.values()],
        [_as_free_slot(row, (warm or {}).get(name)) for name, row in slots.items()],
    )
    if choice is None:
        return None
    return _grant(session, requests[choice[0].run_id], slots[choice[1].name])


def _free_slots(session: Session, host: str) -> Sequence[SlotRow]:
    leased = select(LeaseRow.slot_id).where(LeaseRow.released_at.is_(None))
    free = select(SlotRow).where(SlotRow.host == host, SlotRow.present, SlotRow.id.not_in(leased))
    return session.scalars(free.order_by(SlotRow.id).with_for_update(skip_locked=True)).all()


def _waiting(session: Session, among: Collection[str] | None) -> Sequence[LeaseRequest]:
    waiting = select(LeaseRequest).where(LeaseRequest.state == QUEUED)
    if among is not None:
        waiting = waiting.where(LeaseRequest.run_id.in_(among))
    waiting = waiting.order_by(LeaseRequest.id).limit(_WINDOW)
    return session.scalars(waiting.with_for_update(skip_locked=True)).all()


def _as_request(row: LeaseRequest) -> Request:
    wants = row.requirements
    return Request(
        row.run_id, wants.get("base_model", ""), wants.get("kind"), wants.get("memory_bytes", 0)
    )


def _as_free_slot(row: SlotRow, worker: WarmWorker | None) -> FreeSlot:
    worker = worker or WarmWorker(Warmth.COLD)
    return FreeSlot(row.name, row.kind, row.memory_bytes, worker.warmth, worker.model)


def _grant(session: Session, wanted: LeaseRequest, slot: SlotRow) -> Lease:
    wanted.epoch += 1
    wanted.state = LEASED
    row = LeaseRow(run_id=wanted.run_id, slot_id=slot.id, epoch=wanted.epoch)
    session.add(row)
    session.flush()
    return Lease(row.id, row.run_id, row.epoch, slot.host, slot.name, wanted.requirements)


def release(session: Session, lease: Lease, reason: str) -> bool:
    """Ends a lease and its request, and so frees the slot; False when it had ended already."""
    ended = session.execute(
        update(LeaseRow)
        .where(LeaseRow.id == lease.id, LeaseRow.released_at.is_(None))
        .values(released_at=utc_now(), reason=reason)
        .returning(LeaseRow.id)
    ).first()
    if ended is None:
        return False
    session.execute(
        update(LeaseRequest).where(LeaseRequest.run_id == lease.run_id).values(state=ENDED)
    )
    return True


def open_leases(session: Session, host: str) -> list[Lease]:
    """The leases that this host holds."""
    return _leases(session, SlotRow.host == host)


def orphaned_leases(session: Session, silent_for: timedelta) -> list[Lease]:
    """Leases on hosts whose agent was stopped, or has been silent for so long."""
    ages = select(Host.name, Host.state, Host.heartbeat_at, utc_now())
    lost = [
        name
        for name, state, beat, now in session.execute(ages)
        if state == DOWN or now - beat > silent_for
    ]
    return _leases(session, SlotRow.host.in_(lost))


def _leases(session: Session, condition: Any) -> list[Lease]:
    rows = session.execute(
        select(LeaseRow, SlotRow, LeaseRequest)
        .join(SlotRow, SlotRow.id == LeaseRow.slot_id)
        .join(LeaseRequest, LeaseRequest.run_id == LeaseRow.run_id)
        .where(LeaseRow.released_at.is_(None), condition)
        .order_by(LeaseRow.id)
    )
    return [
        Lease(lease.id, lease.run_id, lease.epoch, slot.host, slot.name, wanted.requirements)
        for lease, slot, wanted in rows
    ]


def describe(session: Session) -> dict[str, list[dict[str, Any]]]:
    """Hosts, slots and the queue, as `signal status` and the pool's pages show them."""
    return {
        "hosts": [_host_entry(row) for row in session.scalars(select(Host).order_by(Host.name))],
        "slots": _slot_entries(session),
        "queued": _queue_entries(session),
    }


def _host_entry(row: Host) -> dict[str, Any]:
    return {
        "name": row.name,
        "state": row.state,
        "started_at": row.started_at,
        "heartbeat_at": row.heartbeat_at,
    }


def _slot_entries(session: Session) -> list[dict[str, Any]]:
    rows = session.execute(
        select(SlotRow, Host.state, LeaseRow)
        .join(Host, Host.name == SlotRow.host)
        .outerjoin(LeaseRow, (LeaseRow.slot_id == SlotRow.id) & LeaseRow.released_at.is_(None))
        .where(SlotRow.present)
        .order_by(SlotRow.host, SlotRow.id)
    )
    return [_slot_entry(slot, host_state, lease) for slot, host_state, lease in rows]


def _slot_entry(slot: SlotRow, host_state: str, lease: LeaseRow | None) -> dict[str, Any]:
    state = "leased" if lease else "free" if host_state == UP else "down"
    return {
        "host": slot.host,
        "name": slot.name,
        "kind": slot.kind,
        "device": slot.device_name,
        "uuid": slot.uuid,
        "memory_bytes": slot.memory_bytes,
        "threads": slot.threads,
        "state": state,
        "run_id": lease.run_id if lease else None,
        "epoch": lease.epoch if lease else None,
        "leased_at": lease.granted_at if lease else None,
    }


def _queue_entries(session: Session) -> list[dict[str, Any]]:
    waiting = select(LeaseRequest).where(LeaseRequest.state == QUEUED).order_by(LeaseRequest.id)
    return [
        {"run_id": row.run_id, "position": position, "requested_at": row.requested_at}
        for position, row in enumerate(session.scalars(waiting))
    ]
