"""What all slots of an agent share: its connections, and the agent's ears. No behaviour of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from celery import Celery

from gpu_pool.control import WorkerControl
from gpu_pool.leases import Lease, Standing
from gpu_pool.parting import Parting
from gpu_pool.watch import Watcher
from workers.queue.journal import Journal
from workers.settings import Settings


@dataclass(frozen=True)
class Pool:
    """Handed to every keeper.

    `settle(lease, parting)` ends a lease; `changed()` says that a worker, or what it does, is another
    now; `gone(node)` that a worker has left things behind in Redis; `standing(run_id)` is what SQL says
    of a run.
    """

    settings: Settings
    app: Celery
    journal: Journal
    control: WorkerControl
    watcher: Watcher
    settle: Callable[[Lease, Parting], None]
    changed: Callable[[], None]
    gone: Callable[[str], None]
    standing: Callable[[str], Standing | None]
