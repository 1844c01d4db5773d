"""Runs that have no slot: which may have one, which are paused, and which have lost their journal.

Looks at their journals' heads and at SQL, and brings the two together: a run that was paused leaves the
queue, one that goes on comes back to its old place, one that has ended is withdrawn, and a journal that
is gone is made anew at the newest snapshot. Every step may be repeated, by any agent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta

from gpu_pool import leases
from gpu_pool.database import Database
from schemas.errors import SignalError
from workers.queue.journal import Journal
from workers.queue.records import Head
from workers.storage.snapshot_keys import snapshot_infos

log = logging.getLogger(__name__)

# A journal is made inside the transaction that makes its run, so one that lacks is lost; all the same
# nothing is made anew in haste: a worker somewhere may be mending it.
GONE_S = 5.0
MADE_BEFORE = timedelta(seconds=10)
# How many paused runs are looked at in one round, beside those that were called.
_PAGE = 64


class Waiting:
    """The runs in the queue, and the paused ones."""

    def __init__(
        self, database: Database, journal: Journal, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Touches nothing yet."""
        self._database, self._journal, self._clock = database, journal, clock
        self._gone_since: dict[str, float] = {}
        self._page = 0

    def look(self, called: Collection[str]) -> list[str]:
        """The runs that may be given a slot, oldest first.

        Of the paused ones, those that were `called` are looked at, and the others by turns.
        """
        with self._database.reading() as session:
            queued, paused = leases.queued(session), leases.paused(session)
        turn = self._turn(paused, called)
        heads = self._heads([*queued, *turn])
        self._mend({*queued, *paused}, heads)
        for run_id in turn:
            if (head := heads.get(run_id)) is not None:
                self._see_to_paused(run_id, head)
        return [run_id for run_id in queued if self._may_start(run_id, heads.get(run_id))]

    def _turn(self, paused: Sequence[str], called: Collection[str]) -> list[str]:
        begin = self._page if self._page < len(paused) else 0
        self._page = begin + _PAGE
        now = [run_id for run_id in paused if run_id in called]
        return list(dict.fromkeys([*now, *paused[begin : self._page]]))

    def _heads(self, run_ids: Sequence[str]) -> dict[str, Head | None]:
        """Of those that have not ended; the others are withdrawn."""
        if not run_ids:
            return {}
        heads = dict(zip(run_ids, self._journal.heads(run_ids), strict=True))
        closed = [run_id for run_id, head in heads.items() if head is not None and head.closed]
        if closed:
            with self._database.writing() as session:
                for run_id in closed:
                    leases.withdraw(session, run_id)
        return {run_id: head for run_id, head in heads.items() if run_id not in closed}

    def _may_start(self, run_id: str, head: Head | None) -> bool:
        if head is not None and head.hold == "paused":
            self._pause(run_id)
            return False
        return head is not None

    def _see_to_paused(self, run_id: str, head: Head) -> None:
        idle = head.hold == "paused" and head.hold_info.get("reason") == "idle"
        if idle and head.waits:
            # It was submitted to at the moment at which it was found idle.
            self._journal.release(run_id, "paused")
        elif not head.hold:
            self._resume(run_id)

    def _pause(self, run_id: str) -> None:
        with self._database.writing() as session:
            if leases.pause(session, run_id):
                log.info("%s is paused while it waits", run_id)

    def _resume(self, run_id: str) -> None:
        with self._database.writing() as session:
            if leases.resume(session, run_id):
                log.info("%s goes on and waits for a slot", run_id)

    # --- lost journals ------------------------------------------------------------------------

    def _mend(self, waiting: Collection[str], heads: Mapping[str, Head | None]) -> None:
        now = self._clock()
        for run_id, head in heads.items():
            if head is None:
                self._gone_since.setdefault(run_id, now)
        self._gone_since = {
            run_id: since
            for run_id, since in self._gone_since.items()
            if run_id in waiting and heads.get(run_id) is None
        }
        due = [run_id for run_id, since in self._gone_since.items() if now - since >= GONE_S]
        if due:
            with self._database.reading() as session:
                owners = leases.owners(session, due, MADE_BEFORE)
            for run_id, owner in owners.items():
                if owner:
                    self._reopen(run_id, owner)

    def _reopen(self, run_id: str, owner: str) -> None:
        """At the newest snapshot: what came after it is nowhere any more."""
        try:
            snapshots = snapshot_infos(self._journal.storage, run_id)
            numbers = [segment.highest for segment in self._journal.segments.all(run_id)]
        except (OSError, SignalError) as error:
            log.warning("%s has lost its journal, and storage is away: %s", run_id, error)
            return
        seq = snapshots[0].seq if snapshots else 0
        if self._journal.reopen(run_id, owner, applied=seq, entries=max([seq, *numbers])):
            log.error("the journal of %s was lost; it is rolled back to seq %d", run_id, seq)
