"""What an event of the stream of commits changes about a run in SQL. No Flask, no Redis."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from schemas.runs import CLOSED_STATUSES
from web.runs.tables import RunRow

_HOLDS = {"paused": "paused", "mismatch": "paused", "rolled_back": "rolled_back"}
_HELD = ("pausing", "paused", "rolled_back")
_SHOWN = ("host", "slot", "kind", "name", "dtype")


def happened(run: RunRow, kind: str, told: str, data: Mapping[str, Any], at: datetime) -> None:
    """Note an event that does not end the run. `told` is the status that a `placed` brings along."""
    if run.status in CLOSED_STATUSES:
        return
    run.status = _status(run, kind, told, data)
    if kind in ("placed", "ready"):
        run.device = dict(data) or run.device
        run.started_at = run.started_at or at
    run.updated_at = at


def _status(run: RunRow, kind: str, told: str, data: Mapping[str, Any]) -> str:
    if kind in _HOLDS:
        return _HOLDS[kind]
    if kind == "resumed":
        # Only a pause has taken the worker away.
        kept = data.get("from") in ("mismatch", "rolled_back") and run.device
        return "ready" if kept else "queued"
    if run.status in _HELD:
        return run.status
    if kind == "placed":
        return told or "loading"
    if kind == "worker_lost":
        # One that had not got so far waits as before.
        return "rebuilding" if run.status in ("ready", "rebuilding") else "queued"
    return "ready" if kind == "ready" else run.status


def shown(kind: str, told: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the event says to the run's owner."""
    if kind in ("placed", "ready"):
        device = {name: data[name] for name in _SHOWN if name in data}
        return {"device": device, "status": told} if told else {"device": device}
    if kind == "closed":
        return {"status": told, "error": dict(data) or None}
    return dict(data)
