"""Ends leases, and with them runs, however often it takes.

What is added here is remembered until it is done: the run's journal is closed when the worker was
lost, its queue removed from the broker, its records given their time to live, and last of all the
slot freed in SQL. Every step may be repeated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from celery import Celery

from gpu_pool import leases
from gpu_pool.control import WorkerControl
from gpu_pool.database import Database
from gpu_pool.leases import Lease
from schemas.errors import SignalError
from workers.queue.app import release_queue
from workers.queue.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settlement:
    lease: Lease
    reason: str
    error: SignalError | None


class Settlements:
    """The agent's list of what has ended and is not yet cleared away."""

    def __init__(
        self, database: Database, app: Celery, journal: Journal, control: WorkerControl
    ) -> None:
        """Touches nothing yet."""
        self._database, self._app = database, app
        self._journal, self._control = journal, control
        self._due: dict[int, _Settlement] = {}
        self._nodes: set[str] = set()

    def add(self, lease: Lease, reason: str, error: SignalError | None) -> None:
        """Ends a lease; with an error, its run has failed. The first word on a lease counts."""
        self._due.setdefault(lease.id, _Settlement(lease, reason, error))

    def forget(self, node: str) -> None:
        """Removes what a dead worker left in Redis."""
        self._nodes.add(node)

    def work(self) -> None:
        """Does all that is due. May raise a connection error; what is left is done next time."""
        for settlement in list(self._due.values()):
            self._settle(settlement)
            del self._due[settlement.lease.id]
        for node in list(self._nodes):
            self._control.forget(node)
            self._nodes.discard(node)

    def clear_withdrawn(self) -> None:
        """Clears away runs that ended before they got a slot."""
        with self._database.reading() as session:
            run_ids = leases.withdrawn(session)
        for run_id in run_ids:
            self._clear(run_id)
        if run_ids:
            with self._database.writing() as session:
                leases.cleared(session, run_ids)

    def _settle(self, settlement: _Settlement) -> None:
        lease, error = settlement.lease, settlement.error
        if error is not None and self._journal.close(lease.run_id, "failed", error):
            log.warning("%s failed: %s", lease.run_id, error.message.splitlines()[0])
        self._clear(lease.run_id)
        with self._database.writing() as session:
            leases.release(session, lease, settlement.reason)
        log.info("%s left %s", lease.run_id, lease.slot)

    def _clear(self, run_id: str) -> None:
        release_queue(self._app, run_id)
        self._journal.retire(run_id)
