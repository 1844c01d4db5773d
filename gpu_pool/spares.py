"""Workers that are started ahead of need.

A cold start takes seconds, a worker that has imported everything and made a dry pass takes over at once.
Where slots are free it waits on one of them; where all are leased one waits beside them, pinned like a
slot's own worker. It holds memory of the host, but none of a device.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_pool.devices import Slot
from gpu_pool.keeper import Phase, SlotKeeper

SPARES = 2


class Spares:
    """The spare workers of a host."""

    def __init__(self, slots: Sequence[SlotKeeper], beside: SlotKeeper) -> None:
        """`beside` keeps the worker that waits beside the slots."""
        self._slots, self._beside = slots, beside

    def ready_for(self, slot: Slot) -> SlotKeeper | None:
        """The keeper beside the slots, when its worker could serve on `slot`."""
        beside = self._beside
        same = beside.slot.environment() == slot.environment()
        return beside if beside.has_spare and same else None

    def start(self) -> None:
        """Starts a worker where one is wanted."""
        keepers = [*self._slots, self._beside]
        # One at a time, and not while a run is on its way in: starting takes a whole core.
        if any(keeper.is_starting for keeper in keepers):
            return
        free = [keeper for keeper in self._slots if not keeper.tenancies]
        count = sum(keeper.phase != Phase.EMPTY for keeper in [*free, self._beside])
        if count >= SPARES:
            return
        if free:
            self._start_first(free)
        else:
            self._beside.pin_as(self._slots[0].slot)
            self._start_first([self._beside])

    @staticmethod
    def _start_first(keepers: Sequence[SlotKeeper]) -> None:
        for keeper in [keeper for keeper in keepers if keeper.wants_worker][:1]:
            keeper.start()
