"""An agent that starts goes on with the workers of the one that died.

A worker is taken over when it is the process that was recorded, its slot is still there and pinned the
same way, and a lease that it serves is still open, if it served any. All others are ended; their runs get new
ones. Touches processes and, for reading, SQL.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping, Sequence

from gpu_pool import leases
from gpu_pool.database import Database
from gpu_pool.keeper import SlotKeeper
from gpu_pool.leases import Lease
from gpu_pool.state import Record
from gpu_pool.workers import Worker, strays
from workers.settings import Settings

log = logging.getLogger(__name__)

STOP_S = 10.0


def adopt(
    settings: Settings,
    database: Database,
    records: Sequence[Record],
    keepers: Mapping[str, SlotKeeper],
) -> list[str]:
    """Gives the recorded workers to the keepers (by slot name, the spare's being ""), and ends those
    that cannot be kept. Returns the nodes of these. Raises a database error; then nothing was done."""
    with database.reading() as session:
        found = leases.open_leases(session, settings.host_name)
    still_open = {lease.id: lease for lease in found}
    kept, ended = [], []
    for record in records:
        keeper = _keeper_of(record, keepers)
        held = _still_held(record, still_open)
        if keeper is not None and _fits(record, keeper) and (held or not record.held):
            keeper.adopt(record, held)
            kept.append(record.worker)
            log.info("%s goes on", record.worker.node)
        else:
            ended.append(record.worker)
            log.warning("%s was left over from an earlier agent and is ended", record.worker.node)
    _end(settings, kept, ended)
    return [worker.node for worker in ended]


def _keeper_of(record: Record, keepers: Mapping[str, SlotKeeper]) -> SlotKeeper | None:
    keeper = keepers.get(record.slot)
    if keeper is not None and not record.slot:
        # A spare was pinned as the worker of some slot.
        pinned = [one.slot for one in keepers.values() if one.slot.environment() == record.pins]
        keeper.slot = pinned[0] if pinned else keeper.slot
    return keeper


def _fits(record: Record, keeper: SlotKeeper) -> bool:
    return keeper.worker is None and record.pins == keeper.slot.environment()


def _still_held(record: Record, still_open: Mapping[int, Lease]) -> list[tuple[Lease, bool]]:
    """Those of the recorded leases that are open still, and whether their runs were ready."""
    found = [(still_open.get(one.lease_id), one) for one in record.held]
    return [
        (lease, one.ready)
        for lease, one in found
        if lease is not None and (lease.epoch, lease.slot) == (one.epoch, record.slot)
    ]


def _end(settings: Settings, kept: Sequence[Worker], ended: Sequence[Worker]) -> None:
    """Their devices are free, and their runs may be leased again, only when they are gone."""
    for worker in ended:
        worker.kill()
    unknown = strays(settings, [*kept, *ended])
    for process in unknown:
        log.warning("pid %d belongs to no known worker and is ended", process.pid)
        process.signal(signal.SIGKILL)
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        if all(worker.gone() for worker in ended) and not any(p.alive() for p in unknown):
            return
        time.sleep(0.02)
