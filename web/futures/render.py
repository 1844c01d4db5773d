"""A future as the API shows it: an entry of the journal, its result spliced in as stored bytes."""

from __future__ import annotations

from typing import Any

from schemas.errors import SignalError
from web.answers import rfc3339, splice
from workers.queue.futures import future_id
from workers.queue.records import Entry, Head
from workers.settings import Settings


def future_bytes(
    settings: Settings,
    entry: Entry,
    applied: int,
    result: bytes | None,
    position: int | None = None,
) -> bytes:
    """The wire form; a finished entry whose result is gone says so in `error`.

    `position` is that of an entry which has no place in the order.
    """
    body = future_body(settings, entry, applied)
    if position is not None:
        body["position"] = position
    if entry.status == "completed" and result is None:
        body["error"] = SignalError("future_expired").to_dict()
    return splice(body, "result", result)


def future_body(settings: Settings, entry: Entry, applied: int) -> dict[str, Any]:
    """The wire form without `result`."""
    return {
        "object": "future",
        "future_id": future_id(settings, entry.run_id, entry.number, entry.tag),
        "run_id": entry.run_id,
        "kind": entry.kind,
        "status": entry.status,
        "seq": entry.seq,
        "lane": entry.lane,
        "client_seq": entry.client_seq,
        "position": _position(entry, applied),
        "tokens": entry.tokens,
        "submitted_at": rfc3339(entry.submitted_at),
        "started_at": rfc3339(entry.started_at),
        "finished_at": rfc3339(entry.finished_at),
        "error": entry.error,
    }


def operation_body(settings: Settings, entry: Entry) -> dict[str, Any]:
    """An entry as a line of the journal."""
    body = future_body(settings, entry, 0)
    names = ("seq", "future_id", "kind", "status", "tokens")
    times = ("submitted_at", "started_at", "finished_at", "error")
    return {name: body[name] for name in (*names, *times)}


def applied_of(head: Head | None) -> int:
    """The last finished seq; what is finished needs none, so a missing journal counts as 0."""
    return head.applied if head else 0


def _position(entry: Entry, applied: int) -> int | None:
    if entry.status != "pending" or entry.seq is None:
        return None
    return max(0, entry.seq - applied - 1)
