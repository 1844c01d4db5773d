"""Reading SQL after the journal: what has finished must be in the answer."""

from __future__ import annotations

import time

from sqlalchemy import select

from gpu_pool.database import Database
from web.runs.tables import RunRow
from workers.queue.records import Head

PATIENCE_S = 2.0
_LOOK_AGAIN_S = 0.02


def wait_for_projection(db: Database, row: RunRow, head: Head | None) -> None:
    """Wait until the projector has read what the journal had finished; a short while at most."""
    wanted, seen = (head.applied if head else 0), row.projected_seq
    deadline = time.monotonic() + PATIENCE_S
    while seen < wanted and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)
        with db.reading() as session:
            query = select(RunRow.projected_seq).where(RunRow.run_id == row.run_id)
            seen = session.scalar(query) or 0
