"""Events of runs in SQL: written by the projector, read by whoever waits for them. No Flask."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from gpu_pool.database import Database
from schemas.runs import CLOSED_STATUSES
from web.answers import rfc3339
from web.events.tables import RunEventRow
from web.runs.tables import RunRow
from workers.queue.futures import FutureHub

# No entry of a journal has this number: in the hub it stands for what happens to the run itself.
HAPPENED = 0
LAST = "closed"
# The end of a run is in SQL at once, its last event a moment later, and after a loss of Redis never.
SETTLED = timedelta(seconds=5)
# A run whose last event does not come wakes nobody.
_LOOK_AGAIN_S = 5.0


@dataclass(frozen=True)
class Page:
    """Events after a cursor. `ended`: nothing comes after them any more."""

    events: list[RunEventRow]
    more: bool
    ended: bool


def add(
    session: Session, run: RunRow, stream_id: str, kind: str, at: datetime, data: Mapping[str, Any]
) -> bool:
    """Write an event; False when it was written before."""
    known = select(RunEventRow.id).where(RunEventRow.stream_id == stream_id)
    if session.scalar(known) is not None:
        return False
    session.add(RunEventRow(run=run.id, type=kind, at=at, data=dict(data), stream_id=stream_id))
    # At once: the next of the same batch gets the next id.
    session.flush()
    return True


def page(db: Database, run_id: str, after: int, limit: int) -> Page | None:
    """Up to `limit` events with a greater id than `after`, in order; None when there is no such run."""
    with db.reading() as session:
        run = session.scalar(select(RunRow).where(RunRow.run_id == run_id))
        if run is None:
            return None
        mine = select(RunEventRow).where(RunEventRow.run == run.id)
        wanted = mine.where(RunEventRow.id > after).order_by(RunEventRow.id).limit(limit + 1)
        rows = list(session.scalars(wanted))
        found, more = rows[:limit], len(rows) > limit
        return Page(found, more, not more and _over(session, run, found))


def _over(session: Session, run: RunRow, found: list[RunEventRow]) -> bool:
    if run.status not in CLOSED_STATUSES:
        return False
    if any(event.type == LAST for event in found):
        return True
    mine = select(RunEventRow.id).where(RunEventRow.run == run.id, RunEventRow.type == LAST)
    if session.scalar(mine) is not None:
        return True
    return run.ended_at is not None and datetime.now(UTC) - run.ended_at > SETTLED


def wait(hub: FutureHub, run_id: str, seconds: float, look: Callable[[], Page]) -> Page:
    """What `look` finds: at once, or as soon as it finds anything or the run has ended."""
    with hub.watch(run_id, [HAPPENED]) as event:
        deadline = time.monotonic() + seconds
        found = look()
        while not found.events and not found.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            event.wait(min(left, _LOOK_AGAIN_S))
            event.clear()
            found = look()
    return found


def event_body(row: RunEventRow) -> dict[str, Any]:
    """The wire form."""
    return {"id": row.id, "type": row.type, "at": rfc3339(row.at), "data": row.data}


def forget(session: Session, run_id: str) -> None:
    """Delete a run's events."""
    mine = select(RunRow.id).where(RunRow.run_id == run_id).scalar_subquery()
    session.execute(delete(RunEventRow).where(RunEventRow.run == mine))
