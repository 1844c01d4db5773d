"""Which run gets a slot of this host, and which gives one up because it has nothing to do.

A run is idle when it has no unfinished operation and nothing has happened to it for `idle_pause_s`: then
it is paused as soon as another one waits that would fit, and in any case after `LONG` times as long. An
operation that is submitted to it resumes it. Touches SQL and, by way of the journal, Redis.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from gpu_pool import grants
from gpu_pool.database import Database
from gpu_pool.keeper import SlotKeeper
from gpu_pool.leases import Lease
from gpu_pool.placement import FreeSlot, Request, fits
from gpu_pool.waiting import Waiting
from workers.failpoints import hit
from workers.queue.journal import Journal
from workers.settings import Settings

log = logging.getLogger(__name__)

LONG = 4


class Leasing:
    """The slots of a host and the runs that wait for them."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        journal: Journal,
        slots: Mapping[str, SlotKeeper],
    ) -> None:
        """Touches nothing yet."""
        self._settings, self._database, self._journal = settings, database, journal
        self._slots = slots
        self._waiting = Waiting(database, journal)
        self._unplaced: list[str] = []

    def lease(self, called: Collection[str]) -> None:
        """Gives free slots to the runs that wait longest; `called`: runs that something happened to."""
        waiting = self._waiting.look(called)
        while waiting and any(keeper.lease is None for keeper in self._slots.values()):
            lease = self._acquire(waiting)
            if lease is None:
                break
            hit("agent.leased")
            log.info("%s goes to %s, epoch %d", lease.run_id, lease.slot, lease.epoch)
            self._slots[lease.slot].take(lease)
            waiting.remove(lease.run_id)
        self._unplaced = waiting

    def _acquire(self, waiting: list[str]) -> Lease | None:
        warm = {name: keeper.warm_worker() for name, keeper in self._slots.items()}
        with self._database.writing() as session:
            return grants.acquire(session, self._settings.host_name, among=waiting, warm=warm)

    def pause_idle(self) -> None:
        """Frees slots of runs that have had nothing to do for long."""
        limit_s = self._settings.idle_pause_s
        idle = [keeper for keeper in self._slots.values() if keeper.idle_s >= limit_s]
        if not idle:
            return
        with self._database.reading() as session:
            wishes = grants.wishes(session, self._unplaced)
        for keeper in making_room(idle, wishes, limit_s):
            if keeper.lease is not None:
                self._journal.hold(keeper.lease.run_id, "paused", {"reason": "idle"})


def making_room(
    idle: Collection[SlotKeeper], wishes: Sequence[Request], limit_s: float
) -> list[SlotKeeper]:
    """Those of the idle keepers that are to make room, the longest idle first: one for every waiting
    run that fits there, and those that have been idle for `LONG` times the limit."""
    left, chosen = list(wishes), []
    for keeper in sorted(idle, key=lambda one: -one.idle_s):
        slot = FreeSlot(keeper.slot.name, keeper.slot.kind, keeper.slot.memory_bytes)
        wanted = next((request for request in left if fits(request, slot)), None)
        if wanted is not None:
            left.remove(wanted)
        if wanted is not None or keeper.idle_s >= LONG * limit_s:
            chosen.append(keeper)
    return chosen
