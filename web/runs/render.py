"""A run as the API shows it: SQL's row with the journal's newer word on top. Pure functions.

A run that SQL knows as unfinished always has a journal; when that is gone, the Redis-protocol server
has lost its data, and the agent opens it anew within seconds: until then the run is being rebuilt.
"""

from __future__ import annotations

import time
from typing import Any

from schemas.runs import CLOSED_STATUSES
from web.answers import rfc3339
from web.runs.tables import RunRow
from workers.queue.records import Head

LOST = "The run's journal was lost and is being opened anew; try again in a moment."
_DEVICE = ("host", "slot", "kind", "name", "dtype")
ACCEPT = {"mismatch": "rebuilt", "rolled_back": "rolled_back"}
_IN_MEMORY = ("ready", "pausing")

History = dict[str, int]


def run_body(
    row: RunRow,
    head: Head | None,
    position: int | None,
    kept: History | None,
    sharing_with: int = 0,
) -> dict[str, Any]:
    """The wire form of a run; `kept` is its history, `position` its place in the queue, and `sharing_with`
    how many others its worker holds."""
    return {
        "object": "run",
        "run_id": row.run_id,
        "user_id": row.user_id,
        "name": row.name,
        "labels": row.labels,
        "base_model": row.base_model,
        "status": status_of(row, head),
        "error": _error(row, head),
        "config": row.config,
        "current_step": current_step(row, head),
        "next_seq": head.seq_count + 1 if head else row.projected_seq + 1,
        "applied_seq": applied_seq(row, head),
        "queued": _queued(head),
        "queue_position": position,
        "device": device_of(row, head),
        "sharing_with": sharing_with,
        "hold": hold_of(head),
        "parent": _parent(row),
        "branchable": kept,
        **_durability(head),
        "created_at": rfc3339(row.created_at),
        "updated_at": _updated_at(row, head),
        "started_at": rfc3339(row.started_at),
        "ended_at": _ended_at(row, head),
    }


def status_of(row: RunRow, head: Head | None) -> str:
    """The journal knows first how a run stands; SQL knows it when the journal has expired."""
    if head is None:
        return row.status if row.status in CLOSED_STATUSES else "rebuilding"
    return head.closed or _held(head) or head.worker_state or "queued"


def _held(head: Head) -> str:
    if head.hold in ("", "rolled_back"):
        return head.hold
    return "pausing" if head.worker else "paused"


def hold_of(head: Head | None) -> dict[str, Any] | None:
    """Why a run takes no operation."""
    if head is None or head.closed or not head.hold:
        return None
    info = dict(head.hold_info)
    paused_by = info.pop("reason", "user")
    return {
        "reason": paused_by if head.hold == "paused" else head.hold,
        "info": info,
        "accept": ACCEPT.get(head.hold),
    }


def branchable_of(row: RunRow, head: Head) -> History | None:
    """The seqs at which a branch of an open run can begin, by the journal's word."""
    # While nothing is sealed the journal is the whole history, of a run that began from nothing.
    first = 0 if head.base == 0 and row.origin is None else head.branch_from
    return None if first is None else {"from": first, "to": head.applied}


def _parent(row: RunRow) -> dict[str, Any] | None:
    if row.origin is None:
        return None
    origin = row.origin
    return {"run_id": origin["run_id"], "seq": origin.get("seq"), "artifact": origin.get("name")}


def _durability(head: Head | None) -> dict[str, Any]:
    """What would be left if its worker were lost now, and how far numbers can be compared."""
    names = ("snapshot", "recovery_s", "deterministic", "fingerprint", "journal")
    if head is None:
        return dict.fromkeys(names)
    size = {"operations": head.seq_count - head.base, "bytes": head.unsealed_bytes}
    found = (_snapshot(head), head.recovery_s, _deterministic(head), head.fingerprint or None, size)
    return dict(zip(names, found, strict=True))


def _snapshot(head: Head) -> dict[str, Any] | None:
    found = head.snapshot
    if found is None:
        return None
    return {"seq": found.seq, "at": rfc3339(found.at), "size_bytes": found.size_bytes}


def _deterministic(head: Head) -> dict[str, Any] | None:
    if not head.fingerprint:
        return None
    return {
        "now": bool(head.fingerprint.get("deterministic")),
        "why_not": head.fingerprint.get("why_not"),
        "since_seq": head.deterministic_since,
    }


def applied_seq(row: RunRow, head: Head | None) -> int:
    """The last finished seq."""
    return head.applied if head else row.projected_seq


def current_step(row: RunRow, head: Head | None) -> int:
    """Optimizer steps taken."""
    return int(head.state.get("step", 0)) if head else row.current_step


def device_of(row: RunRow, head: Head | None) -> dict[str, Any] | None:
    """The device that the run is leased; null before that."""
    found = (head.device if head else None) or row.device
    return {name: found.get(name) for name in _DEVICE} if found else None


def session_body(row: RunRow, head: Head | None, worker: dict[str, Any] | None) -> dict[str, Any]:
    """What the run's worker holds, by the journal's word."""
    status = status_of(row, head)
    last = head.last_activity if head else row.updated_at.timestamp()
    return {
        "status": _session_status(status),
        "run_id": row.run_id,
        "user_id": row.user_id,
        "current_step": current_step(row, head),
        "accumulation_count": int(head.state.get("accumulated", 0)) if head else 0,
        "next_seq": head.seq_count + 1 if head else row.projected_seq + 1,
        "applied_seq": applied_seq(row, head),
        "queued": _queued(head),
        "last_activity_at": rfc3339(last),
        "last_activity": round(max(0.0, time.time() - last), 3),
        "config": row.config,
        "device": device_of(row, head),
        "worker": worker,
    }


def _session_status(status: str) -> str:
    if status in CLOSED_STATUSES:
        return "closed"
    return "active" if status in _IN_MEMORY else "uninitialized"


def _queued(head: Head | None) -> int:
    return head.unfinished if head and not head.closed else 0


def _error(row: RunRow, head: Head | None) -> dict[str, Any] | None:
    return head.close_error if head and head.closed else row.error


def _ended_at(row: RunRow, head: Head | None) -> str | None:
    # SQL learns of an end a moment after the journal, whose last activity it was.
    if row.ended_at is None and head is not None and head.closed:
        return rfc3339(head.last_activity)
    return rfc3339(row.ended_at)


def _updated_at(row: RunRow, head: Head | None) -> str | None:
    stored = row.updated_at.timestamp()
    return rfc3339(max(stored, head.last_activity) if head else stored)
