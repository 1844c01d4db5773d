"""Leases: which run holds which slot, and under which epoch. SQL only; no Redis, no processes.

The web tier files a request in the transaction that creates a run; the agent of a host grants it
(`gpu_pool.grants`). The grant raises the run's epoch in the same transaction, and nothing else ever
does: a worker that holds an older epoch is fenced out by the journal. A lease ends with its run, or
puts the run back into the queue. All times are the database's.

Every function runs inside the caller's transaction; those that change anything need a session of
`Database.writing()`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from gpu_pool.database import utc_now
from gpu_pool.tables import (
    CLOSING,
    DOWN,
    ENDED,
    LEASED,
    PAUSED,
    QUEUED,
    WITHDRAWN,
    Host,
    LeaseRequest,
    LeaseRow,
    SlotRow,
)

# How many of the oldest requests are looked at together.
WINDOW = 64
# The reason of a lease whose worker never had its run ready.
START_FAILED = "worker_start_failed"
# The reason of a lease that ended because its run was to leave the slot.
MOVED = "moved"


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
class Standing:
    """What SQL says of a run: whether it holds a lease and goes on, and the last seq that is known."""

    leased: bool
    known_seq: int


# --- requests ---------------------------------------------------------------------------------


def request(session: Session, run_id: str, requirements: Mapping[str, Any]) -> None:
    """Queues a run for a device; a repeat changes nothing.

    `requirements`: `base_model` and `config` (handed to the worker as they are, like `origin`, if
    given), `owner`, and optionally `kind` ("cpu" or "cuda") and `memory_bytes`; `shares`, by kind of device
    what it would hold beside others (`workers.footprint`), and `dedicated` for a device of its own.
    """
    missing = {"base_model", "config"} - requirements.keys()
    if missing:
        raise ValueError(f"requirements lack {', '.join(sorted(missing))}")
    known = session.scalar(select(LeaseRequest.id).where(LeaseRequest.run_id == run_id))
    if known is None:
        session.add(LeaseRequest(run_id=run_id, state=QUEUED, requirements=dict(requirements)))


def withdraw(session: Session, run_id: str) -> bool:
    """The run has ended: it waits no longer, and a lease that it holds will not put it back.

    False when it did not wait. Otherwise an agent clears away what the run left in Redis, and calls
    `cleared`.
    """
    _change(session, run_id, LEASED, CLOSING)
    return _change(session, run_id, QUEUED, WITHDRAWN) or _change(
        session, run_id, PAUSED, WITHDRAWN
    )


def withdrawn(session: Session) -> list[str]:
    """Runs that were withdrawn and are still to be cleared away."""
    return _in_state(session, WITHDRAWN, WINDOW)


def cleared(session: Session, run_ids: Collection[str]) -> None:
    """Notes that nothing is left to do for these runs."""
    session.execute(
        update(LeaseRequest)
        .where(LeaseRequest.run_id.in_(run_ids), LeaseRequest.state == WITHDRAWN)
        .values(state=ENDED)
    )


def queued(session: Session, limit: int = WINDOW) -> list[str]:
    """The ids of the runs that wait for a slot, oldest first."""
    return _in_state(session, QUEUED, limit)


def paused(session: Session) -> list[str]:
    """The ids of the runs that have no slot because they are paused, oldest first."""
    return _in_state(session, PAUSED, None)


def pause(session: Session, run_id: str) -> bool:
    """Takes a paused run out of the queue; False when it was not waiting there."""
    return _change(session, run_id, QUEUED, PAUSED)


def resume(session: Session, run_id: str) -> bool:
    """Puts a run that is no longer paused back into the queue; False when it was not paused."""
    return _change(session, run_id, PAUSED, QUEUED)


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


def owners(
    session: Session, run_ids: Collection[str], made_before: timedelta
) -> dict[str, str | None]:
    """The owners of those of these runs that wait, queued or paused, and were made so long ago."""
    rows = session.execute(
        select(LeaseRequest, utc_now()).where(
            LeaseRequest.run_id.in_(run_ids), LeaseRequest.state.in_((QUEUED, PAUSED))
        )
    )
    return {
        row.run_id: row.requirements.get("owner")
        for row, now in rows
        if now - row.requested_at >= made_before
    }


def note_seq(session: Session, run_id: str, seq: int) -> None:
    """The projector's word on how far SQL has come with a run."""
    session.execute(
        update(LeaseRequest)
        .where(LeaseRequest.run_id == run_id, LeaseRequest.known_seq != seq)
        .values(known_seq=seq)
    )


def standing(session: Session, run_id: str) -> Standing | None:
    """Where a run stands; None when nothing is known of it (any more)."""
    row = session.scalar(select(LeaseRequest).where(LeaseRequest.run_id == run_id))
    return None if row is None else Standing(row.state == LEASED, row.known_seq)


def _in_state(session: Session, state: str, limit: int | None) -> list[str]:
    found = select(LeaseRequest.run_id).where(LeaseRequest.state == state)
    return list(session.scalars(found.order_by(LeaseRequest.id).limit(limit)))


def _change(session: Session, run_id: str, before: str, after: str) -> bool:
    changed = session.execute(
        update(LeaseRequest)
        .where(LeaseRequest.run_id == run_id, LeaseRequest.state == before)
        .values(state=after)
        .returning(LeaseRequest.id)
    )
    return changed.first() is not None


# --- leases -----------------------------------------------------------------------------------


def release(session: Session, lease: Lease, reason: str) -> bool:
    """Ends a lease and its request, and so frees the slot; False when it had ended already."""
    if not _end(session, lease, reason):
        return False
    session.execute(
        update(LeaseRequest).where(LeaseRequest.run_id == lease.run_id).values(state=ENDED)
    )
    return True


def requeue(session: Session, lease: Lease, reason: str, state: str = QUEUED) -> bool:
    """Ends a lease whose run goes on: frees the slot, and the run waits again, in its old place.

    `state` may also be PAUSED. False when the lease had ended already. A run that has ended meanwhile
    is left to be cleared away.
    """
    if not _end(session, lease, reason):
        return False
    _change(session, lease.run_id, LEASED, state)
    _change(session, lease.run_id, CLOSING, WITHDRAWN)
    return True


def _end(session: Session, lease: Lease, reason: str) -> bool:
    ended = session.execute(
        update(LeaseRow)
        .where(LeaseRow.id == lease.id, LeaseRow.released_at.is_(None))
        .values(released_at=utc_now(), reason=reason)
        .returning(LeaseRow.id)
    )
    return ended.first() is not None


def failed_starts(session: Session, run_id: str) -> int:
    """How many of the run's last leases in a row ended before the run was ready."""
    reasons = (
        select(LeaseRow.reason)
        .where(LeaseRow.run_id == run_id, LeaseRow.released_at.is_not(None))
        .order_by(LeaseRow.epoch.desc())
        .limit(WINDOW)
    )
    count = 0
    for reason in session.scalars(reasons):
        if reason != START_FAILED:
            break
        count += 1
    return count


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
