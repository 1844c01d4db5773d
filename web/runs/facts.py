"""What never changes about a run, remembered per process: the hot path asks SQL nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from gpu_pool.database import Database
from schemas.errors import SignalError
from web.runs.tables import RunRow
from workers.queue.journal import Journal

MAX_RUNS = 4096


@dataclass(frozen=True)
class RunFacts:
    """Owner, model and configuration of a run; `generation` names its journal ("" when that is gone)."""

    run_id: str
    user_id: str
    base_model: str
    config: dict[str, Any]
    generation: str


class RunFactsCache:
    """Least recently used runs fall out."""

    def __init__(self, db: Database, journal: Journal) -> None:
        """Reads both on a miss."""
        self._db, self._journal = db, journal
        self._lock = threading.Lock()
        self._known: OrderedDict[str, RunFacts] = OrderedDict()

    def get(self, run_id: str, user_id: str) -> RunFacts:
        """The run's facts. Raises SignalError not_found for an unknown run and for another's."""
        with self._lock:
            found = self._known.get(run_id)
            if found is not None:
                self._known.move_to_end(run_id)
        found = found or self._load(run_id)
        if found is None or found.user_id != user_id:
            raise SignalError("not_found", "There is no such run, or it is not yours.")
        return found

    def _load(self, run_id: str) -> RunFacts | None:
        if not _sane(run_id):
            return None
        with self._db.reading() as session:
            row = session.scalar(select(RunRow).where(RunRow.run_id == run_id))
        if row is None:
            return None
        head = self._journal.head(run_id)
        generation = head.generation if head is not None else ""
        facts = RunFacts(run_id, row.user_id, row.base_model, row.config, generation)
        if head is not None:
            self._remember(facts)
        return facts

    def _remember(self, facts: RunFacts) -> None:
        with self._lock:
            self._known[facts.run_id] = facts
            while len(self._known) > MAX_RUNS:
                self._known.popitem(last=False)


def _sane(run_id: str) -> bool:
    # What can be no run id never reaches a database (PostgreSQL refuses a NUL, for one).
    return len(run_id) <= 32 and run_id.isascii() and run_id.isprintable()
