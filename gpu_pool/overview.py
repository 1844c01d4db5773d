"""Hosts, slots and the queue, as `signal status` and the pool's pages show them. Reads SQL only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gpu_pool.tables import PAUSED, QUEUED, UP, Host, LeaseRequest, LeaseRow, SlotRow


def describe(session: Session) -> dict[str, list[dict[str, Any]]]:
    """The pool at this moment: `hosts`, `slots`, and the runs that are `queued` and `paused`."""
    return {
        "hosts": [_host_entry(row) for row in session.scalars(select(Host).order_by(Host.name))],
        "slots": _slot_entries(session),
        "queued": _request_entries(session, QUEUED),
        "paused": _request_entries(session, PAUSED),
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
        select(SlotRow, Host.state)
        .join(Host, Host.name == SlotRow.host)
        .where(SlotRow.present)
        .order_by(SlotRow.host, SlotRow.id)
    ).all()
    held: dict[int, list[LeaseRow]] = {slot.id: [] for slot, _ in rows}
    open_ones = select(LeaseRow).where(LeaseRow.released_at.is_(None)).order_by(LeaseRow.id)
    for lease in session.scalars(open_ones):
        held.get(lease.slot_id, []).append(lease)
    return [_slot_entry(slot, host_state, held[slot.id]) for slot, host_state in rows]


def _slot_entry(slot: SlotRow, host_state: str, held: Sequence[LeaseRow]) -> dict[str, Any]:
    state = "leased" if held else "free" if host_state == UP else "down"
    return {
        "host": slot.host,
        "name": slot.name,
        "kind": slot.kind,
        "device": slot.device_name,
        "uuid": slot.uuid,
        "memory_bytes": slot.memory_bytes,
        "threads": slot.threads,
        "state": state,
        "runs": [
            {"run_id": lease.run_id, "epoch": lease.epoch, "leased_at": lease.granted_at}
            for lease in held
        ],
    }


def _request_entries(session: Session, state: str) -> list[dict[str, Any]]:
    waiting = select(LeaseRequest).where(LeaseRequest.state == state).order_by(LeaseRequest.id)
    return [
        {
            "run_id": row.run_id,
            "position": position,
            "requested_at": row.requested_at,
            # 0 for a run that never had a slot; another one waits to go on.
            "epoch": row.epoch,
        }
        for position, row in enumerate(session.scalars(waiting))
    ]
