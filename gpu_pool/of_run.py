"""One run's leases, for the web tier: whether it has one, could have another, and their deletion. SQL only.

Every function runs inside the caller's transaction.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Select, delete, select
from sqlalchemy.orm import Session

from gpu_pool.database import utc_now
from gpu_pool.placement import FreeSlot, Request, fits
from gpu_pool.tables import UP, Host, LeaseRequest, LeaseRow, SlotRow

# A host that was silent for so long serves nobody.
_PRESENT = timedelta(seconds=15)


def is_leased(session: Session, run_id: str) -> bool:
    """Whether a worker may still hold the run."""
    return session.scalar(_open(run_id)) is not None


def another_is_free(session: Session, run_id: str) -> bool:
    """Whether a free slot of a living host fits the run, other than the one that it holds."""
    wanted = session.scalar(select(LeaseRequest).where(LeaseRequest.run_id == run_id))
    if wanted is None:
        return False
    needs = wanted.requirements
    request = Request(
        run_id, needs.get("base_model", ""), needs.get("kind"), needs.get("memory_bytes", 0)
    )
    leased = select(LeaseRow.slot_id).where(LeaseRow.released_at.is_(None))
    free = (
        select(SlotRow, Host.heartbeat_at, utc_now())
        .join(Host, Host.name == SlotRow.host)
        .where(SlotRow.present, SlotRow.id.not_in(leased), Host.state == UP)
    )
    return any(
        now - beat < _PRESENT and fits(request, FreeSlot(slot.name, slot.kind, slot.memory_bytes))
        for slot, beat, now in session.execute(free)
    )


def forget(session: Session, run_id: str) -> None:
    """Delete the run's request and leases; it must not hold one any more."""
    session.execute(delete(LeaseRow).where(LeaseRow.run_id == run_id))
    session.execute(delete(LeaseRequest).where(LeaseRequest.run_id == run_id))


def _open(run_id: str) -> Select[int]:
    return select(LeaseRow.id).where(LeaseRow.run_id == run_id, LeaseRow.released_at.is_(None))
