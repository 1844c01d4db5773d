"""What never changes about a run, remembered per process: the hot path asks SQL nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from gpu_pool.database import Database
from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from web.runs.tables import RunRow

MAX_RUNS = 4096
NO_RUN = "There is no such run, or it is not yours."
_ERASED = ":erased"


@dataclass(frozen=True)
class RunFacts:
    """Owner, model and configuration of a run."""

    run_id: str
    user_id: str
    base_model: str
    config: dict[str, Any]


class RunFactsCache:
    """Least recently used runs fall out; a run that was deleted, in whichever process, is forgotten."""

    def __init__(self, db: Database, listen: Callable[[], None] = lambda: None) -> None:
        """Reads `db` on a miss; `listen` is called before anything is remembered."""
        self._db, self._listen = db, listen
        self._lock = threading.Lock()
        self._known: OrderedDict[str, RunFacts] = OrderedDict()
        self._forgotten = 0

    def get(self, run_id: str, user_id: str) -> RunFacts:
        """The run's facts. Raises SignalError not_found for an unknown run and for another's."""
        with self._lock:
            found = self._known.get(run_id)
            if found is not None:
                self._known.move_to_end(run_id)
        found = found or self._load(run_id)
        if found is None or found.user_id != user_id:
            raise SignalError("not_found", NO_RUN)
        return found

    def heard(self, message: str) -> None:
        """A message of the hub's, or "" when some may have been missed."""
        if message and not message.endswith(_ERASED):
            return
        with self._lock:
            self._forgotten += 1
            if message:
                self._known.pop(message.removesuffix(_ERASED), None)
            else:
                self._known.clear()

    def _load(self, run_id: str) -> RunFacts | None:
        if not _sane(run_id):
            return None
        before = self._forgotten
        with self._db.reading() as session:
            row = session.scalar(select(RunRow).where(RunRow.run_id == run_id))
        if row is None:
            return None
        facts = RunFacts(run_id, row.user_id, row.base_model, row.config)
        self._listen()
        self._remember(facts, before)
        return facts

    def is_open(self, run_id: str) -> bool:
        """SQL's word on whether a run has not ended, for one whose journal is gone."""
        with self._db.reading() as session:
            status = session.scalar(select(RunRow.status).where(RunRow.run_id == run_id))
        return status is not None and status not in CLOSED_STATUSES

    def _remember(self, facts: RunFacts, before: int) -> None:
        with self._lock:
            if self._forgotten != before:
                # It may have been deleted since it was read.
                return
            self._known[facts.run_id] = facts
            while len(self._known) > MAX_RUNS:
                self._known.popitem(last=False)


def erased(run_id: str) -> str:
    """What is published when a run has been deleted."""
    return f"{run_id}{_ERASED}"


def _sane(run_id: str) -> bool:
    # What can be no run id never reaches a database (PostgreSQL refuses a NUL, for one).
    return len(run_id) <= 32 and run_id.isascii() and run_id.isprintable()
