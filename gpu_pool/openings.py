"""Slots and requests in SQL as placement sees them. Reads SQL only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gpu_pool.placement import Device, Opening, Request
from gpu_pool.tables import LeaseRequest, LeaseRow, SlotRow
from workers.footprint import Footprint


def openings(session: Session, slots: Iterable[SlotRow]) -> list[Opening]:
    """These slots, each with the runs that hold a lease on it."""
    rows = {row.id: row for row in slots}
    held = (
        select(LeaseRow.slot_id, LeaseRequest.requirements)
        .join(LeaseRequest, LeaseRequest.run_id == LeaseRow.run_id)
        .where(LeaseRow.released_at.is_(None), LeaseRow.slot_id.in_(rows))
    )
    tenants: dict[int, list[Footprint | None]] = defaultdict(list)
    for slot_id, wants in session.execute(held):
        tenants[slot_id].append(shares(wants).get(rows[slot_id].kind))
    return [as_opening(row, *tenants[row.id]) for row in rows.values()]


def as_opening(row: SlotRow, *tenants: Footprint | None) -> Opening:
    """A slot with these runs on it."""
    return Opening(
        row.name,
        row.kind,
        row.memory_bytes,
        device=row.device_name,
        host=row.host,
        tenants=tenants,
    )


def as_request(row: LeaseRequest, slot: SlotRow | None = None, *, moved: bool = False) -> Request:
    """What a run asks for; `slot` is the one that it was on last, which it was to leave if it `moved`."""
    wants = row.requirements
    return Request(
        row.run_id,
        wants.get("base_model", ""),
        wants.get("kind"),
        wants.get("memory_bytes", 0),
        near=Device(slot.kind, slot.device_name) if slot is not None else None,
        avoid=f"{slot.host}/{slot.name}" if slot is not None and moved else "",
        shares=shares(wants),
    )


def shares(wants: Mapping[str, Any]) -> dict[str, Footprint]:
    """What a run would hold beside others, by kind of device; nothing for one that is to be alone, as for
    those of earlier versions, whose size nobody knows."""
    if wants.get("dedicated"):
        return {}
    return {kind: Footprint(**found) for kind, found in wants.get("shares", {}).items()}
