"""Ends leases, however often it takes: the run goes back into the queue, or is cleared away.

What is added here is remembered until it is done: the journal is told how run and worker parted, and
last of all the slot is freed in SQL. Of a run that has ended, its queue is removed from the broker and
its records get their time to live. Every step may be repeated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from celery import Celery

from gpu_pool import leases
from gpu_pool.control import WorkerControl
from gpu_pool.database import Database
from gpu_pool.leases import START_FAILED, Lease
from gpu_pool.parting import Parting, lost_worker
from gpu_pool.tables import PAUSED, QUEUED
from workers.queue.app import release_queue
from workers.queue.journal import Journal
from workers.queue.records import Head

log = logging.getLogger(__name__)

# So often in a row a run's workers may fail before it is ready; then the run has failed.
ATTEMPTS = 5


@dataclass(frozen=True)
class _Settlement:
    lease: Lease
    parting: Parting


class Settlements:
    """The agent's list of leases that have ended and are not yet settled."""

    def __init__(
        self, database: Database, app: Celery, journal: Journal, control: WorkerControl
    ) -> None:
        """Touches nothing yet."""
        self._database, self._app = database, app
        self._journal, self._control = journal, control
        self._due: dict[int, _Settlement] = {}
        self._nodes: set[str] = set()

    def add(self, lease: Lease, parting: Parting) -> None:
        """Ends a lease. The first word on a lease counts."""
        self._due.setdefault(lease.id, _Settlement(lease, parting))

    @property
    def due(self) -> bool:
        """True while a lease is still to be settled."""
        return bool(self._due)

    def forget(self, node: str) -> None:
        """Removes what a dead worker left in Redis."""
        self._nodes.add(node)

    def work(self) -> None:
        """Does all that is due. May raise a connection error; what is left is done next time."""
        for settlement in list(self._due.values()):
            self._settle(settlement.lease, settlement.parting)
            del self._due[settlement.lease.id]
        for node in list(self._nodes):
            self._control.forget(node)
            self._nodes.discard(node)

    def clear_withdrawn(self) -> None:
        """Clears away runs that ended while they held no slot."""
        with self._database.reading() as session:
            run_ids = leases.withdrawn(session)
        for run_id in run_ids:
            # SQL knows how it ended; a journal that was lost and mended since does not.
            self._journal.close(run_id, "cancelled")
            self._clear(run_id)
        if run_ids:
            with self._database.writing() as session:
                leases.cleared(session, run_ids)

    def _settle(self, lease: Lease, parting: Parting) -> None:
        parting = self._corrected(lease, parting)
        self._give_up(lease, parting)
        head = self._tell(lease, parting)
        if head is not None and head.closed:
            self._clear(lease.run_id)
            with self._database.writing() as session:
                leases.release(session, lease, parting.reason)
            log.info("%s has ended and left %s", lease.run_id, lease.slot)
            return
        state = PAUSED if head is not None and head.hold == "paused" else QUEUED
        with self._database.writing() as session:
            leases.requeue(session, lease, parting.reason, state)
        log.info("%s left %s (%s) and is %s", lease.run_id, lease.slot, parting.reason, state)

    def _corrected(self, lease: Lease, parting: Parting) -> Parting:
        """The journal may know of a worker that its run was ready when the agent, or the one before
        it, had no time to see that."""
        if parting.reason != START_FAILED:
            return parting
        head = self._journal.head(lease.run_id)
        ready = head is not None and (head.epoch, head.worker_state) == (lease.epoch, "ready")
        return lost_worker(parting.lost, blame=parting.blame) if ready else parting

    def _give_up(self, lease: Lease, parting: Parting) -> None:
        """A run that could not be started often enough in a row has failed."""
        if parting.reason != START_FAILED or parting.error is None:
            return
        with self._database.reading() as session:
            failed_before = leases.failed_starts(session, lease.run_id)
        over = failed_before + 1 >= ATTEMPTS
        if over and self._journal.close(lease.run_id, "failed", parting.error):
            log.warning("%s failed: %s", lease.run_id, parting.error.message.splitlines()[0])

    def _tell(self, lease: Lease, parting: Parting) -> Head | None:
        """The journal's state of the run, once it knows that the worker is gone."""
        run_id, epoch = lease.run_id, lease.epoch
        if parting.lost:
            self._journal.lost_worker(run_id, epoch, parting.lost, blame=parting.blame)
        head = self._journal.head(run_id)
        if not parting.lost or (head is not None and head.hold == "paused"):
            self._journal.detached(run_id, epoch)
        return head

    def _clear(self, run_id: str) -> None:
        release_queue(self._app, run_id)
        self._journal.retire(run_id)
