"""A run as the API shows it: SQL's row with the journal's newer word on top. Pure functions.

A run that SQL knows as unfinished always has a journal; when that is gone, the Redis-protocol server
has lost its data, and the run is shown as failed with this reason, never as if nothing had happened.
"""

from __future__ import annotations

import time
from typing import Any

from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from web.answers import rfc3339
from web.runs.tables import RunRow
from workers.queue.records import Head

LOST = SignalError(
    "operation_failed", "The run's journal is gone: the Redis-protocol server has lost its data."
)
_DEVICE = ("host", "slot", "kind", "name", "dtype")


def run_body(row: RunRow, head: Head | None, position: int | None) -> dict[str, Any]:
    """The wire form of a run."""
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
        "applied_seq": head.applied if head else row.projected_seq,
        "queued": _queued(head),
        "queue_position": position,
        "device": device_of(row, head),
        "created_at": rfc3339(row.created_at),
        "updated_at": _updated_at(row, head),
        "started_at": rfc3339(row.started_at),
        "ended_at": _ended_at(row, head),
    }


def status_of(row: RunRow, head: Head | None) -> str:
    """The journal knows first how a run stands; SQL knows it when the journal has expired."""
    if head is None:
        return row.status if row.status in CLOSED_STATUSES else "failed"
    return head.closed or head.worker_state or "queued"


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
    known = {"ready": "active", "queued": "uninitialized", "loading": "uninitialized"}
    last = head.last_activity if head else row.updated_at.timestamp()
    return {
        "status": known.get(status, "closed"),
        "run_id": row.run_id,
        "user_id": row.user_id,
        "current_step": current_step(row, head),
        "accumulation_count": int(head.state.get("accumulated", 0)) if head else 0,
        "next_seq": head.seq_count + 1 if head else row.projected_seq + 1,
        "applied_seq": head.applied if head else row.projected_seq,
        "queued": _queued(head),
        "last_activity_at": rfc3339(last),
        "last_activity": round(max(0.0, time.time() - last), 3),
        "config": row.config,
        "device": device_of(row, head),
        "worker": worker,
    }


def _queued(head: Head | None) -> int:
    return head.seq_count - head.applied if head and not head.closed else 0


def _error(row: RunRow, head: Head | None) -> dict[str, Any] | None:
    if head is None and row.status not in CLOSED_STATUSES:
        return LOST.to_dict()
    return head.close_error if head and head.closed else row.error


def _ended_at(row: RunRow, head: Head | None) -> str | None:
    # SQL learns of an end a moment after the journal, whose last activity it was.
    if row.ended_at is None and head is not None and head.closed:
        return rfc3339(head.last_activity)
    return rfc3339(row.ended_at)


def _updated_at(row: RunRow, head: Head | None) -> str | None:
    stored = row.updated_at.timestamp()
    return rfc3339(max(stored, head.last_activity) if head else stored)
