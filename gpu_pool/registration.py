"""This host in SQL: registered once, renewed every few seconds, taken down at the end.

Also where an agent learns of leases that nobody serves: its own from before a restart, and those of
hosts that went silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

from gpu_pool import hosts, leases
from gpu_pool.database import Database
from gpu_pool.devices import Slot
from gpu_pool.leases import Lease

RENEW_S = 5.0
HOST_LOST_S = 60.0


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
        self._renewed_at = self._in_touch_since = float("-inf")
        self.done = False

    def renew(self, served: Collection[int]) -> list[tuple[Lease, str]]:
        """Shows a sign of life when one is due. `served`: the ids of the leases in good hands.

        Returns the leases that nobody serves, each with the reason in words.
        """
        now = self._clock()
        if now - self._renewed_at < RENEW_S:
            return []
        with self._database.writing() as session:
            if not self.done:
                hosts.register(session, self._host, self._slots)
            hosts.renew(session, self._host)
            own = leases.open_leases(session, self._host)
            lost = leases.orphaned_leases(session, timedelta(seconds=HOST_LOST_S))
        self.done = True
        self._note_contact(now)
        unserved = [(it, "the server was restarted") for it in own if it.id not in served]
        if self._may_judge(now):
            unserved += [(it, f"nothing is heard of host {it.host}") for it in lost]
        return unserved

    def take_down(self) -> None:
        """The host takes no more leases until an agent registers it again."""
        with self._database.writing() as session:
            hosts.take_down(session, self._host)

    def _note_contact(self, now: float) -> None:
        if now - self._renewed_at > 3 * RENEW_S:
            self._in_touch_since = now
        self._renewed_at = now

    def _may_judge(self, now: float) -> bool:
        # Right after SQL was away every host looks silent, so another host counts as lost only when
        # this agent has been in touch for as long itself.
        return now - self._in_touch_since >= HOST_LOST_S
