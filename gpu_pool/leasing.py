"""Which run gets a place on this host, and which gives one up because it has nothing to do.

A run is idle when it has no unfinished operation and nothing has happened to it for `idle_pause_s`: then
it is paused as soon as another one waits that would fit in its place, and in any case after `LONG` times as
long. An operation that is submitted to it resumes it. Touches SQL and, by way of the journal, Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_pool import grants
from gpu_pool.database import Database
from gpu_pool.keeper import SlotKeeper
from gpu_pool.leases import Lease
from gpu_pool.openings import shares
from gpu_pool.placement import Opening, Request, fits
from gpu_pool.tenancy import Tenancy
from gpu_pool.waiting import Waiting
from workers.failpoints import hit
from workers.queue.journal import Journal
from workers.settings import Settings

log = logging.getLogger(__name__)

LONG = 4
# What was in vain is tried again after so long, though nothing has changed that is seen here.
AGAIN_S = 1.0


@dataclass(frozen=True)
class Idle:
    """A run that has had nothing to do for `idle_s`, and its slot as it would be without it."""

    run_id: str
    idle_s: float
    slot: Opening


class Leasing:
    """The slots of a host and the runs that wait for them."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        journal: Journal,
        slots: Mapping[str, SlotKeeper],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Touches nothing yet."""
        self._clock = clock
        self._in_vain: tuple[Any, float] = (None, 0.0)
        self._settings, self._database, self._journal = settings, database, journal
        self._slots = slots
        self._waiting = Waiting(database, journal)
        self._unplaced: list[str] = []

    def lease(self, called: Collection[str]) -> None:
        """Gives slots to the runs that wait longest; `called`: runs that something happened to."""
        waiting = self._waiting.look(called)
        while waiting and self._is_worth_trying(waiting):
            lease = self._acquire(waiting)
            if lease is None:
                self._in_vain = (self._standing(waiting), self._clock())
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

    def _is_worth_trying(self, waiting: Sequence[str]) -> bool:
        """Whether there is room, and something has changed since there was none for just these."""
        if not any(len(keeper.tenancies) < keeper.takes for keeper in self._slots.values()):
            return False
        before, at = self._in_vain
        return self._clock() - at >= AGAIN_S or before != self._standing(waiting)

    def _standing(self, waiting: Sequence[str]) -> Any:
        held = {
            name: (keeper.warm_worker(), *(it.lease.id for it in keeper.tenancies))
            for name, keeper in self._slots.items()
        }
        return tuple(waiting), held

    def pause_idle(self) -> None:
        """Frees the places of runs that have had nothing to do for long."""
        limit_s, most = self._settings.idle_pause_s, self._settings.max_runs_per_worker
        idle = [
            Idle(it.lease.run_id, it.idle_s, _without(keeper, it, most))
            for keeper in self._slots.values()
            for it in keeper.tenancies
            if it.idle_s >= limit_s
        ]
        if not idle:
            return
        with self._database.reading() as session:
            wishes = grants.wishes(session, self._unplaced)
        for run_id in making_room(idle, wishes, limit_s):
            self._journal.hold(run_id, "paused", {"reason": "idle"})


def _without(keeper: SlotKeeper, tenancy: Tenancy, most: int) -> Opening:
    slot = keeper.slot
    others = [it.lease.requirements for it in keeper.tenancies if it is not tenancy]
    tenants = tuple(shares(wants).get(slot.kind) for wants in others)
    return Opening(slot.name, slot.kind, slot.memory_bytes, tenants=tenants, most=most)


def making_room(idle: Collection[Idle], wishes: Sequence[Request], limit_s: float) -> list[str]:
    """Those of the idle runs that are to make room, the longest idle first: one for every waiting run that
    fits in its place, all of a slot for one that needs it whole, and those that have been idle for `LONG`
    times the limit."""
    left, chosen = list(wishes), list[str]()
    for one in sorted(idle, key=lambda it: -it.idle_s):
        wanted = next((request for request in left if fits(request, one.slot)), None)
        if wanted is not None:
            left.remove(wanted)
        if wanted is not None or one.idle_s >= LONG * limit_s:
            chosen.append(one.run_id)
    return chosen + _whole_slots([it for it in idle if it.run_id not in chosen], left)


def _whole_slots(idle: Collection[Idle], wishes: list[Request]) -> list[str]:
    """The runs of slots where all are idle, one slot for each of the wishes that it would fit."""
    chosen: list[str] = []
    for name in dict.fromkeys(it.slot.name for it in idle):
        there = [it for it in idle if it.slot.name == name]
        free = replace(there[0].slot, tenants=())
        wanted = next((request for request in wishes if fits(request, free)), None)
        if wanted is not None and len(there) == len(there[0].slot.tenants) + 1:
            wishes.remove(wanted)
            chosen += [it.run_id for it in there]
    return chosen
