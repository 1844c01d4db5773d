"""Grants: the transaction that gives a place on a host to a run, under the run's next epoch.

What fits best is decided by `gpu_pool.placement`; here the slots and the requests are read and locked.
SQL only. All times are the database's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from gpu_pool.database import utc_now
from gpu_pool.leases import MOVED, WINDOW, Lease
from gpu_pool.openings import as_opening, as_request, openings
from gpu_pool.placement import Opening, Request, Warmth, place, suits
from gpu_pool.tables import LEASED, QUEUED, UP, Host, LeaseRequest, LeaseRow, SlotRow

# How long a run is left to another host that has what it would rather have.
PATIENCE = timedelta(seconds=10)
# How long a run that fits nowhere sees younger ones join others before a slot is kept for it.
LONG = timedelta(seconds=60)
# A host that was silent for so long is not waited for.
_PRESENT = timedelta(seconds=15)


@dataclass(frozen=True)
class WarmWorker:
    """What the agent knows of the worker on a slot, for the choice between slots; `takes` is how many runs it
    may hold at present."""

    warmth: Warmth
    model: str | None = None
    takes: int = 1


@dataclass(frozen=True)
class _Waiting:
    """A queued request; `patient` while it is left to a host that suits it better, `young` while it is left
    to one that has a free slot."""

    row: LeaseRequest
    request: Request
    patient: bool
    young: bool


def acquire(
    session: Session,
    host: str,
    *,
    among: Collection[str] | None = None,
    warm: Mapping[str, WarmWorker] | None = None,
) -> Lease | None:
    """Grants a slot of `host` to the oldest request that fits one; None when none does.

    `among` limits the requests to these runs and `warm` describes the workers by slot name. Other
    agents may grant at the same time: PostgreSQL skips the rows that they have locked, SQLite lets
    one writer in.
    """
    slots = {row.name: row for row in _slots(session, host)}
    known = warm or {}
    here = [_described(found, known.get(found.name)) for found in openings(session, slots.values())]
    waiting = {it.row.run_id: it for it in _waiting(session, among)} if slots else {}
    served = [it.request for it in waiting.values() if not _left_to_others(session, host, it, here)]
    choice = place(served, here)
    if choice is None:
        return None
    return _grant(session, waiting[choice[0].run_id].row, slots[choice[1].name])


def wishes(session: Session, run_ids: Collection[str]) -> list[Request]:
    """What these runs ask for, as far as they are queued; oldest first."""
    return [waiting.request for waiting in _read(session, _queued(run_ids))]


def _slots(session: Session, host: str) -> Sequence[SlotRow]:
    own = select(SlotRow).where(SlotRow.present, SlotRow.host == host).order_by(SlotRow.id)
    return session.scalars(own.with_for_update(skip_locked=True)).all()


def _free() -> Select[SlotRow]:
    leased = select(LeaseRow.slot_id).where(LeaseRow.released_at.is_(None))
    return select(SlotRow).where(SlotRow.present, SlotRow.id.not_in(leased))


def _described(found: Opening, worker: WarmWorker | None) -> Opening:
    worker = worker or WarmWorker(Warmth.COLD)
    return replace(found, warmth=worker.warmth, model=worker.model, most=worker.takes)


def _waiting(session: Session, among: Collection[str] | None) -> Iterator[_Waiting]:
    # The last lease hangs on an outer join, whose rows PostgreSQL cannot lock.
    locked = _queued(among).with_for_update(of=LeaseRequest, skip_locked=True)
    return _read(session, locked)


def _queued(among: Collection[str] | None) -> Select[LeaseRequest, LeaseRow, SlotRow]:
    """Queued requests, oldest first, each with its last lease and that one's slot, if any."""
    last = (LeaseRow.run_id == LeaseRequest.run_id) & (LeaseRow.epoch == LeaseRequest.epoch)
    waiting = (
        select(LeaseRequest, LeaseRow, SlotRow)
        .outerjoin(LeaseRow, last)
        .outerjoin(SlotRow, SlotRow.id == LeaseRow.slot_id)
        .where(LeaseRequest.state == QUEUED)
    )
    if among is not None:
        waiting = waiting.where(LeaseRequest.run_id.in_(among))
    return waiting.order_by(LeaseRequest.id).limit(WINDOW)


def _read(session: Session, query: Select[LeaseRequest, LeaseRow, SlotRow]) -> Iterator[_Waiting]:
    for row, lease, slot, now in session.execute(query.add_columns(utc_now())):
        released_at = lease.released_at if lease is not None else None
        recent = released_at is not None and now - released_at < PATIENCE
        moved = lease is not None and lease.reason == MOVED
        age = now - row.requested_at
        request = replace(as_request(row, slot, moved=moved), long=age >= LONG)
        yield _Waiting(row, request, recent, age < PATIENCE)


def _left_to_others(
    session: Session, host: str, waiting: _Waiting, here: Sequence[Opening]
) -> bool:
    """True while another host has a free slot that suits the run and this one has none."""
    request = waiting.request
    own = [slot for slot in here if suits(request, slot)]
    if any(not slot.tenants for slot in own) or not (waiting.patient or (own and waiting.young)):
        return False
    return any(suits(request, slot) for slot in _free_elsewhere(session, host))


def _free_elsewhere(session: Session, host: str) -> list[Opening]:
    rows = session.execute(
        _free()
        .join(Host, Host.name == SlotRow.host)
        .where(Host.name != host, Host.state == UP)
        .add_columns(Host.heartbeat_at, utc_now())
    )
    return [as_opening(row) for row, beat, now in rows if now - beat < _PRESENT]


def _grant(session: Session, wanted: LeaseRequest, slot: SlotRow) -> Lease:
    wanted.epoch += 1
    wanted.state = LEASED
    row = LeaseRow(run_id=wanted.run_id, slot_id=slot.id, epoch=wanted.epoch)
    session.add(row)
    session.flush()
    return Lease(row.id, row.run_id, row.epoch, slot.host, slot.name, wanted.requirements)
