"""One run's leases, for the web tier: whether it has one, could have another, with how many it shares its
worker, and their deletion. SQL only.

Every function runs inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session, aliased

from gpu_pool.database import utc_now
from gpu_pool.openings import as_request, openings
from gpu_pool.placement import fits
from gpu_pool.tables import UP, Host, LeaseRequest, LeaseRow, SlotRow

# A host that was silent for so long serves nobody.
_PRESENT = timedelta(seconds=15)


def is_leased(session: Session, run_id: str) -> bool:
    """Whether a worker may still hold the run."""
    return session.scalar(_open(run_id)) is not None


def another_is_open(session: Session, run_id: str, most: int) -> bool:
    """Whether a slot of a living host could take the run, other than the one that it holds: a free one, or
    one that holds fewer than `most` runs of its base."""
    wanted = session.scalar(select(LeaseRequest).where(LeaseRequest.run_id == run_id))
    if wanted is None:
        return False
    request = as_request(wanted)
    own = select(LeaseRow.slot_id).where(LeaseRow.released_at.is_(None), LeaseRow.run_id == run_id)
    others = (
        select(SlotRow, Host.heartbeat_at, utc_now())
        .join(Host, Host.name == SlotRow.host)
        .where(SlotRow.present, SlotRow.id.not_in(own), Host.state == UP)
    )
    present = [slot for slot, beat, now in session.execute(others) if now - beat < _PRESENT]
    return any(fits(request, replace(slot, most=most)) for slot in openings(session, present))


def neighbours(session: Session, run_ids: Collection[str]) -> dict[str, int]:
    """For each of these runs that is on a worker, how many others are there."""
    own, other = aliased(LeaseRow), aliased(LeaseRow)
    beside = (other.slot_id == own.slot_id) & other.released_at.is_(None)
    counts = (
        select(own.run_id, func.count() - 1)
        .join(other, beside)
        .where(own.run_id.in_(run_ids), own.released_at.is_(None))
        .group_by(own.run_id)
    )
    return {row[0]: row[1] for row in session.execute(counts)}


def forget(session: Session, run_id: str) -> None:
    """Delete the run's request and leases; it must not hold one any more."""
    session.execute(delete(LeaseRow).where(LeaseRow.run_id == run_id))
    session.execute(delete(LeaseRequest).where(LeaseRequest.run_id == run_id))


def _open(run_id: str) -> Select[int]:
    return select(LeaseRow.id).where(LeaseRow.run_id == run_id, LeaseRow.released_at.is_(None))
