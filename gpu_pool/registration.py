"""This host in SQL: registered once, renewed every few seconds, taken down at the end.

Also where an agent learns which leases nobody serves (its own from before a restart, those of hosts
that went silent) and which of those that it serves are over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from gpu_pool import hosts, leases, parting
from gpu_pool.database import Database
from gpu_pool.devices import Slot
from gpu_pool.leases import Lease
from gpu_pool.parting import Parting

RENEW_S = 5.0
HOST_LOST_S = 60.0


@dataclass(frozen=True)
class Found:
    """What a renewal showed: leases that nobody serves, each with how it ends, and the ids of served
    ones that are over."""

    unserved: list[tuple[Lease, Parting]] = field(default_factory=list)
    over: set[int] = field(default_factory=set)


class Registration:
    """The agent's standing in the database."""

    def __init__(
        self,
        database: Database,
        host: str,
        slots: Sequence[Slot],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Touches nothing yet."""
        self._database, self._host, self._slots, self._clock = database, host, slots, clock
        self._renewed_at = float("-inf")
        # The last heartbeat of every other host, and since when this agent has seen no newer one.
        self._beats: dict[str, tuple[datetime, float]] = {}
        self.done = False

    def renew(self, served: Collection[int]) -> Found:
        """Shows a sign of life when one is due. `served`: the ids of the leases in good hands."""
        now = self._clock()
        if now - self._renewed_at < RENEW_S:
            return Found()
        with self._database.writing() as session:
            if not self.done:
                hosts.register(session, self._host, self._slots)
            hosts.renew(session, self._host)
            own = leases.open_leases(session, self._host)
            lost = leases.orphaned_leases(session, timedelta(seconds=HOST_LOST_S))
            beats = hosts.heartbeats(session)
        self.done = True
        self._note_beats(beats, now)
        unserved = [(it, parting.RESTARTED) for it in own if it.id not in served]
        unserved += [(it, parting.lost_host(it.host)) for it in lost if self._is_lost(it.host, now)]
        return Found(unserved, set(served) - {it.id for it in own})

    def take_down(self) -> None:
        """The host takes no more leases until an agent registers it again."""
        with self._database.writing() as session:
            hosts.take_down(session, self._host)

    def _note_beats(self, beats: dict[str, datetime | None], now: float) -> None:
        # Right after SQL was away every host looks silent, and when the database's clock jumps too: so
        # another host counts as lost only when this agent itself has waited long enough for a sign.
        in_touch = now - self._renewed_at <= 3 * RENEW_S
        before = self._beats if in_touch else {}
        self._beats = {
            host: before[host] if host in before and before[host][0] == beat else (beat, now)
            for host, beat in beats.items()
            if beat is not None
        }
        self._renewed_at = now

    def _is_lost(self, host: str, now: float) -> bool:
        """A host without a heartbeat was stopped in order: it needs no waiting for."""
        known = self._beats.get(host)
        return host != self._host and (known is None or now - known[1] >= HOST_LOST_S)
