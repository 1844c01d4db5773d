"""Keeps one slot: a worker on it, and a lease from its grant to its release.

A state machine that `step` moves on without waiting: empty → starting → idle → attaching → serving
→ detaching → idle. A worker that ends, in any phase, goes by way of ending to empty, and its lease
ends with it, once no process of it is left. Touches the worker's process and, by way of `journal` and
`control`, Redis; leases are released by the agent's `settle`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from celery import Celery

from gpu_pool.control import Report, WorkerControl
from gpu_pool.devices import Slot
from gpu_pool.leases import Lease, WarmWorker
from gpu_pool.placement import Warmth
from gpu_pool.timing import Bell, Pulse
from gpu_pool.watch import Watcher
from gpu_pool.workers import Worker, start_worker
from schemas.errors import SignalError
from workers.queue.app import wake
from workers.queue.journal import Journal
from workers.queue.records import Head
from workers.settings import Settings

log = logging.getLogger(__name__)

START_DEADLINE_S = 120.0
ATTACH_DEADLINE_S = 600.0
DETACH_DEADLINE_S = 30.0
SILENCE_S = 120.0
RESEND_S = 10.0
CONFIRMATIONS = 30
LONGEST_BACKOFF_S = 60.0


class Phase(StrEnum):
    """Where a slot stands."""

    EMPTY = "empty"
    STARTING = "starting"
    IDLE = "idle"
    ATTACHING = "attaching"
    SERVING = "serving"
    DETACHING = "detaching"
    ENDING = "ending"


@dataclass(frozen=True)
class Pool:
    """What all slots of an agent share.

    `settle(lease, reason, error)` ends a lease, and with an error its run; `changed()` says that a
    worker came or went; `gone(node)` that a worker has left things behind in Redis.
    """

    settings: Settings
    app: Celery
    journal: Journal
    control: WorkerControl
    watcher: Watcher
    settle: Callable[[Lease, str, SignalError | None], None]
    changed: Callable[[], None]
    gone: Callable[[str], None]


class SlotKeeper:
    """One slot with its worker and its lease, if any."""

    def __init__(self, slot: Slot, pool: Pool) -> None:
        """Starts nothing yet."""
        self.slot, self._pool = slot, pool
        self.phase = Phase.EMPTY
        self.worker: Worker | None = None
        self.lease: Lease | None = None
        self._model = ""
        self._pulse, self._bell = Pulse(), Bell()
        self._deadline = self._resend_at = self._start_at = 0.0
        self._backoff, self._unconfirmed = 1.0, 0
        self._error: SignalError | None = None

    # --- what the agent asks and tells --------------------------------------------------------

    @property
    def in_transit(self) -> bool:
        """True while it waits for something that only polling shows."""
        return self.phase in (Phase.STARTING, Phase.DETACHING, Phase.ENDING)

    @property
    def wants_spare(self) -> bool:
        """True when a worker could be started here ahead of time."""
        return (
            self.phase == Phase.EMPTY and self.lease is None and time.monotonic() >= self._start_at
        )

    def warm_worker(self) -> WarmWorker:
        """How ready this slot is for a run."""
        if self.phase == Phase.IDLE:
            return WarmWorker(Warmth.IDLE, self._model or None)
        return WarmWorker(Warmth.STARTING if self.phase == Phase.STARTING else Warmth.COLD)

    def take(self, lease: Lease) -> None:
        """Gives the slot a lease; the next step acts on it."""
        self.lease, self._bell = lease, Bell()

    def start(self) -> None:
        """Starts a worker. Raises OSError when the machine cannot."""
        self.worker = start_worker(self._pool.settings, self.slot)
        self._enter(Phase.STARTING, START_DEADLINE_S)
        self._pool.changed()
        self._pool.watcher.watch(self.worker.parent)

    def step(self) -> None:
        """Moves on as far as possible without waiting. May raise a connection error; then the next
        step tries the same again."""
        worker = self.worker
        if worker is None:
            if self.lease is not None:
                self._start_for(self.lease)
            return
        why = worker.ended()
        if why is not None and self.phase != Phase.ENDING:
            self._lose(why)
        if self.phase == Phase.ENDING:
            self._bury(worker)
        else:
            self._attend(worker, self._pool.control.report(worker.node))

    def _attend(self, worker: Worker, report: Report | None) -> None:
        """What a living worker's phase asks for."""
        if self.phase == Phase.STARTING:
            self._await_hello(worker, report)
        else:
            self._listen(report)
        if self.lease is None:
            return
        if self.phase == Phase.IDLE:
            self._attach(worker, self.lease)
        elif self.phase == Phase.DETACHING:
            self._detach(worker, self.lease, report)
        elif self.phase in (Phase.ATTACHING, Phase.SERVING):
            self._follow(worker, self.lease, report)

    # --- the worker ---------------------------------------------------------------------------

    def _start_for(self, lease: Lease) -> None:
        try:
            self.start()
        except OSError as error:  # a full disk, no more processes
            failure = SignalError(
                "worker_start_failed", f"The run's worker did not start: {error}."
            )
            self._pool.settle(lease, failure.code, failure)
            self.lease = None

    def _await_hello(self, worker: Worker, report: Report | None) -> None:
        now = time.monotonic()
        if report is not None and worker.know_child(report.pid):
            assert worker.child is not None
            self._pool.watcher.watch(worker.child)
            self._pool.changed()
            self._backoff = 1.0
            log.info("%s is ready after %.1f s", worker.node, now - worker.started_at)
            self._enter(Phase.IDLE)
        elif now >= self._deadline:
            self._lose(f"it did not report itself within {START_DEADLINE_S:.0f} s")
        elif now >= self._resend_at:
            self._resend_at = now + RESEND_S
            self._pool.control.hello(worker.node)

    def _listen(self, report: Report | None) -> None:
        self._model = report.model if report else self._model
        silent = self._pulse.silent_s(report.heartbeat if report else "", time.monotonic())
        if silent > SILENCE_S:
            self._lose(f"it gave no sign of life for {silent:.0f} s")

    def _lose(self, why: str) -> None:
        """The worker is dead or useless: end what is left of it."""
        assert self.worker is not None
        last = self.worker.last_words().rpartition("\n")[2]
        log.warning("%s was lost while %s: %s; log: %s", self.worker.node, self.phase, why, last)
        # In the phase of detaching the run has ended already.
        detaching = self.phase == Phase.DETACHING
        self._error = None if detaching else _lost(self.worker, self.phase, why)
        self.worker.kill()
        self._enter(Phase.ENDING)

    def _bury(self, worker: Worker) -> None:
        """The device is free, and the run over, only when no process of the worker is left."""
        if not worker.gone():
            worker.kill()
            return
        worker.reap()
        if self.lease is not None:
            reason = self._error.code if self._error else "ended"
            self._pool.settle(self.lease, reason, self._error)
        self.worker = self.lease = None
        self._model, self._pulse = "", Pulse()
        self._start_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF_S)
        self._enter(Phase.EMPTY)
        self._pool.gone(worker.node)
        self._pool.changed()

    # --- the lease ----------------------------------------------------------------------------

    def _attach(self, worker: Worker, lease: Lease) -> None:
        journal, device = self._pool.journal, self._device()
        if not journal.install_epoch(lease.run_id, lease.epoch, worker.node, device):
            head = journal.head(lease.run_id)
            ours = head is not None and (head.epoch, head.worker) == (lease.epoch, worker.node)
            if head is None or head.closed or not ours:
                self._let_go("ended")
                return
        if self._pool.control.add_queue(worker.node, lease.run_id):
            worker.mark_log()
            self._enter(Phase.ATTACHING, ATTACH_DEADLINE_S)
            self._send_run(worker, lease)
            return
        # Counted, not timed: after an outage of Redis the worker needs a while to come back.
        self._unconfirmed += 1
        if self._unconfirmed >= CONFIRMATIONS:
            self._lose(f"it did not answer {CONFIRMATIONS} times")

    def _device(self) -> dict[str, Any]:
        return self.slot.for_run(self._pool.settings.host_name)

    def _send_run(self, worker: Worker, lease: Lease) -> None:
        spec = {
            "base_model": lease.requirements["base_model"],
            "config": lease.requirements["config"],
            "device": self._device(),
        }
        self._pool.control.attach(worker.node, lease.run_id, lease.epoch, spec)
        self._resend_at = time.monotonic() + RESEND_S

    def _follow(self, worker: Worker, lease: Lease, report: Report | None) -> None:
        """While the run lives: wait until it is loaded, ring when its work stands still."""
        now, head = time.monotonic(), self._pool.journal.head(lease.run_id)
        if head is None or head.closed or head.epoch != lease.epoch:
            self._enter(Phase.DETACHING, DETACH_DEADLINE_S)
        elif self.phase == Phase.SERVING:
            self._ring(head, now)
        elif head.worker_state == "ready":
            self._enter(Phase.SERVING)
        elif now >= self._deadline:
            self._lose(f"it did not load the model within {ATTACH_DEADLINE_S:.0f} s")
        elif now >= self._resend_at and report is not None and report.run != lease.run_id:
            self._send_run(worker, lease)  # the broker lost the first message

    def _ring(self, head: Head, now: float) -> None:
        waiting = head.applied < head.seq_count
        if self._bell.due(head.applied, waiting, head.running is not None, now):
            wake(self._pool.app, head.run_id)

    def _detach(self, worker: Worker, lease: Lease, report: Report | None) -> None:
        now = time.monotonic()
        if now >= self._resend_at:
            self._resend_at = now + RESEND_S
            self._pool.control.drop_queue(worker.node, lease.run_id)
            self._pool.control.detach(worker.node, lease.run_id)
        elif report is not None and report.run != lease.run_id:
            self._let_go("ended")
        elif now >= self._deadline:
            self._lose(f"it did not let go of an ended run within {DETACH_DEADLINE_S:.0f} s")

    def _let_go(self, reason: str) -> None:
        """The lease is over and the worker stays, warm for the next run."""
        assert self.lease is not None
        self._pool.settle(self.lease, reason, None)
        self.lease = None
        self._enter(Phase.IDLE)

    def _enter(self, phase: Phase, deadline_s: float = 0.0) -> None:
        self.phase, self._deadline = phase, time.monotonic() + deadline_s
        self._resend_at, self._unconfirmed = 0.0, 0


def _lost(worker: Worker, phase: Phase, why: str) -> SignalError:
    if phase == Phase.SERVING:
        return SignalError("worker_lost", f"The run's worker was lost: {why}.")
    tail = worker.last_words()
    said = f" The end of its log:\n{tail}" if tail else ""
    return SignalError("worker_start_failed", f"The run's worker did not start: {why}.{said}")
