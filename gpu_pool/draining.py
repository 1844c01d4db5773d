"""The end of an agent that was asked to stop: its workers finish, its runs wait for the next one.

Every worker that has runs ends its present operation, writes a snapshot of each and goes, within a bounded
time.
Touches processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gpu_pool import parting
from gpu_pool.keeper import SlotKeeper
from gpu_pool.leases import Lease
from gpu_pool.parting import Parting
from gpu_pool.workers import Worker

# Less than what `signal up` waits for its agent (AGENT_GRACE_S in web/stack/services.py).
DRAIN_S = 28.0
KILL_S = 3.0
_LOOK_S = 0.02


def drain(keepers: Sequence[SlotKeeper], settle: Callable[[Lease, Parting], None]) -> list[Worker]:
    """Ends every worker, and every lease with it; the workers, of which no process is left."""
    workers = [keeper.worker for keeper in keepers if keeper.worker is not None]
    for keeper in keepers:
        if keeper.worker is not None and keeper.tenancies:
            keeper.worker.drain()
        elif keeper.worker is not None:
            keeper.worker.kill()  # it has nothing to finish
    _await_gone(workers, DRAIN_S)
    late = {worker.node for worker in workers if not worker.gone()}
    for worker in workers:
        worker.kill()
    _await_gone(workers, KILL_S)
    for worker in workers:
        worker.reap()
    for keeper in keepers:
        for tenancy in keeper.tenancies:
            settle(tenancy.lease, tenancy.parted or _how(keeper, late))
        keeper.tenancies, keeper.worker = [], None
    return workers


def _how(keeper: SlotKeeper, late: set[str]) -> Parting:
    if keeper.worker is not None and keeper.worker.node in late:
        return parting.Parting(parting.DRAINED.reason, "it did not stop in time with its server")
    return parting.DRAINED


def _await_gone(workers: Sequence[Worker], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(worker.gone() for worker in workers):
        time.sleep(_LOOK_S)
