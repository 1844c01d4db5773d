"""Keeps one slot: a worker on it, and the runs that it is leased to, if any.

A state machine that `step` moves on without waiting: empty → starting → up. A worker that ends, in any
phase, goes by way of ending to empty, and its leases end with it, once no process of it is left. What
happens between worker and run is `gpu_pool.tenancy`'s; what its runs have in common, the worker's life, is
here. Touches the worker's processes and, by way of `control`, Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum

from gpu_pool import parting
from gpu_pool.control import Report
from gpu_pool.devices import Slot
from gpu_pool.exits import from_outside
from gpu_pool.grants import WarmWorker
from gpu_pool.leases import Lease
from gpu_pool.parting import Parting
from gpu_pool.placement import Warmth
from gpu_pool.pool import Pool
from gpu_pool.state import Held, Record
from gpu_pool.tenancy import RESEND_S, Loss, Tenancy
from gpu_pool.timing import Pulse
from gpu_pool.workers import Worker, start_worker

log = logging.getLogger(__name__)

START_DEADLINE_S = 120.0
SILENCE_S = 120.0
LONGEST_BACKOFF_S = 15.0
# A worker that lived this long had started well, as had one that served: the next is started at once.
SETTLED_S = 10.0


class Phase(StrEnum):
    """Where a worker stands."""

    EMPTY = "empty"
    STARTING = "starting"
    UP = "up"
    ENDING = "ending"


class SlotKeeper:
    """One slot with its worker and its leases, if any."""

    def __init__(
        self, slot: Slot, pool: Pool, spare: Callable[[Slot], SlotKeeper | None] = lambda _: None
    ) -> None:
        """Starts nothing yet. `spare` names the keeper of a ready worker, not on a slot of its own, that
        could serve on a slot; None when there is none."""
        self.slot, self._pool, self._spare = slot, pool, spare
        self.phase = Phase.EMPTY
        self.worker: Worker | None = None
        self.tenancies: list[Tenancy] = []
        self._start_at, self._backoff = 0.0, 1.0
        self._since = self._resend_at = 0.0
        self._model, self._heard, self._warm, self._pulse = "", "", False, Pulse()
        self._send_away_at = 0.0

    # --- what the agent asks and tells --------------------------------------------------------

    @property
    def in_transit(self) -> bool:
        """True while it waits for something that only polling shows."""
        leaving = any(tenancy.leaving for tenancy in self.tenancies)
        return self.phase in (Phase.STARTING, Phase.ENDING) or leaving

    @property
    def is_starting(self) -> bool:
        """True while a worker starts here, or a run is on its way in."""
        return self.phase == Phase.STARTING or not all(it.ready for it in self.tenancies)

    @property
    def takes(self) -> int:
        """How many runs may be here at present: none beside those whose worker is being ended."""
        return 1 if self.phase == Phase.ENDING else self._pool.settings.max_runs_per_worker

    @property
    def wants_worker(self) -> bool:
        """True when a worker could be started here ahead of time."""
        return self.phase == Phase.EMPTY and not self.tenancies and not self._resting

    @property
    def has_spare(self) -> bool:
        """True when the worker has nothing to do: it is ready for a run, or will be soon."""
        return self.phase in (Phase.STARTING, Phase.UP) and not self.tenancies

    @property
    def _resting(self) -> bool:
        return time.monotonic() < self._start_at

    def warm_worker(self) -> WarmWorker:
        """How ready this slot is for a run."""
        if self.phase == Phase.UP:
            warmth = Warmth.WARM if self._warm else Warmth.IDLE
            return WarmWorker(warmth, self._model or None, self.takes)
        if self.phase == Phase.EMPTY and (spare := self._spare(self.slot)) is not None:
            return spare.warm_worker()
        if self.phase == Phase.EMPTY and self._resting:
            return WarmWorker(Warmth.RESTING, takes=self.takes)
        starting = self.phase == Phase.STARTING
        return WarmWorker(Warmth.STARTING if starting else Warmth.COLD, takes=self.takes)

    def take(self, lease: Lease) -> None:
        """Gives the slot a lease; the next step acts on it."""
        for earlier in [it for it in self.tenancies if it.lease.run_id == lease.run_id]:
            # Of the same run, and over: to let go of it now would be to let go of the run that comes back.
            self._settle(earlier, parting.SUPERSEDED)
        self.tenancies.append(Tenancy(lease, self.slot, self._pool))

    def give_up(self, lease_id: int) -> None:
        """SQL says that the lease is over: the worker lets go of the run."""
        for tenancy in [it for it in self.tenancies if it.lease.id == lease_id and not it.leaving]:
            if self.phase == Phase.UP:
                tenancy.leave(parting.SUPERSEDED)
            elif self.phase != Phase.ENDING:
                self._settle(tenancy, parting.SUPERSEDED)

    def pin_as(self, slot: Slot) -> None:
        """The next worker that is started here is pinned as that of `slot`."""
        if self.worker is None:
            self.slot = slot

    def start(self) -> None:
        """Starts a worker. Raises OSError when the machine cannot."""
        self.worker = start_worker(self._pool.settings, self.slot)
        self._enter(Phase.STARTING)
        self._pool.watcher.watch(self.worker.parent)

    def hand_over(self) -> Worker:
        """Gives a spare worker away."""
        assert self.worker is not None
        worker = self.worker
        self._forget_worker()
        self._enter(Phase.EMPTY)
        return worker

    def record(self, slot: str) -> Record | None:
        """What the next agent must know; None without a worker."""
        if self.worker is None:
            return None
        return Record(
            self.worker,
            slot,
            self.slot.environment(),
            tuple(Held(it.lease.id, it.lease.epoch, it.ready) for it in self.tenancies),
            ending=self.phase == Phase.ENDING,
        )

    def adopt(self, record: Record, held: Sequence[tuple[Lease, bool]]) -> None:
        """Goes on with the worker of an agent that died, and with the leases that are open still. A run that
        was on its way in (not ready) is attached once more, which changes nothing for the worker."""
        self.worker = record.worker
        for process in record.worker.processes():
            self._pool.watcher.watch(process)
        if record.ending:
            record.worker.kill()
        self.tenancies = [Tenancy(it, self.slot, self._pool, ready=ready) for it, ready in held]
        self._enter(Phase.STARTING if record.worker.child is None else Phase.UP)

    def step(self) -> None:
        """Moves on as far as possible without waiting. May raise a connection error; then the next
        step tries the same again."""
        if self.worker is None and self.tenancies and not self._resting:
            self._start_for_runs()
        if self.worker is None:
            return
        end = self.worker.ended()
        if end is not None and self.phase != Phase.ENDING:
            self._lose(Loss(self.worker.why(end), self.worker.blames(end), from_outside(end)))
        if self.phase == Phase.ENDING:
            self._bury(self.worker)
        else:
            self._attend(self.worker, self._pool.control.report(self.worker.node))

    # --- the worker ---------------------------------------------------------------------------

    def _attend(self, worker: Worker, report: Report | None) -> None:
        """What a living worker asks for."""
        if self.phase == Phase.STARTING:
            self._await_hello(worker, report)
        else:
            self._listen(worker, report)
        for tenancy in list(self.tenancies):
            if self.phase != Phase.UP:
                return
            outcome = tenancy.step(worker, report)
            if isinstance(outcome, Loss):
                self._lose(outcome)
            elif outcome is not None:
                # What the log said of this one is not for the owners of the others.
                worker.mark_log()
                self._settle(tenancy, outcome)

    def _start_for_runs(self) -> None:
        spare = self._spare(self.slot)
        if spare is not None:
            # Even one that still starts is ahead of a new one.
            self.worker = spare.hand_over()
            self._enter(Phase.STARTING if self.worker.child is None else Phase.UP)
            return
        try:
            self.start()
        except OSError as error:  # a full disk, no more processes
            for tenancy in list(self.tenancies):
                self._settle(tenancy, parting.failed_start(str(error), ""))
            self._rest()

    def _await_hello(self, worker: Worker, report: Report | None) -> None:
        now = time.monotonic()
        if report is not None and worker.know_child(report.pid):
            assert worker.child is not None
            if not self.tenancies:
                self._pool.control.warm(worker.node)
            self._pool.watcher.watch(worker.child)
            self._backoff = 1.0
            log.info("%s is ready after %.1f s", worker.node, worker.lived_s())
            self._enter(Phase.UP)
        elif now - self._since > START_DEADLINE_S:
            self._lose(Loss(f"it did not report itself within {START_DEADLINE_S:.0f} s"))
        elif now >= self._resend_at:
            self._resend_at = now + RESEND_S
            self._pool.control.hello(worker.node)

    def _listen(self, worker: Worker, report: Report | None) -> None:
        if report is not None:
            self._model, self._heard = report.model, report.heartbeat
            self._warm = self._warm or report.warm or bool(report.model)
            self._send_away(worker, report.runs - {it.lease.run_id for it in self.tenancies})
        silent = self._pulse.silent_s(self._heard, time.monotonic())
        if silent > SILENCE_S:
            self._lose(Loss(f"it gave no sign of life for {silent:.0f} s"))

    def _send_away(self, worker: Worker, strangers: Collection[str]) -> None:
        """Runs whose leases were over before this agent began are let go of."""
        if not strangers or time.monotonic() < self._send_away_at:
            return
        self._send_away_at = time.monotonic() + RESEND_S
        for run_id in strangers:
            self._pool.control.drop_queue(worker.node, run_id)
            self._pool.control.detach(worker.node, run_id)

    def _lose(self, loss: Loss) -> None:
        """The worker is dead or useless: end what is left of it."""
        worker = self.worker
        assert worker is not None
        executed, words = worker.executing(), worker.last_words()
        doing = ", ".join(f"{it.stage} {it.lease.run_id}" for it in self.tenancies) or self.phase
        last = words.rpartition("\n")[2]
        log.warning("%s was lost while %s: %s; log: %s", worker.node, doing, loss.why, last)
        for tenancy in self.tenancies:
            # The log of several runs is not for the owner of one.
            tenancy.lose(loss, executed, words if len(self.tenancies) == 1 else "")
        worker.kill()
        self._enter(Phase.ENDING)

    def _bury(self, worker: Worker) -> None:
        """The device is free, and the leases over, only when no process of the worker is left."""
        if not worker.gone():
            worker.kill()
            return
        worker.reap()
        if not any(it.ready for it in self.tenancies) and worker.lived_s() < SETTLED_S:
            self._rest()
        for tenancy in list(self.tenancies):
            # One that came only now waits for the next worker.
            if tenancy.parted is not None:
                self._settle(tenancy, tenancy.parted)
        self._forget_worker()
        self._enter(Phase.EMPTY)
        self._pool.gone(worker.node)

    def _rest(self) -> None:
        """Workers die at once here: the next one is started later, and the one after it later still."""
        self._start_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF_S)

    def _settle(self, tenancy: Tenancy, why: Parting) -> None:
        """The lease is over; the worker, if it lives, stays for its other runs and for the next."""
        self.tenancies.remove(tenancy)
        self._pool.settle(tenancy.lease, why)
        self._pool.changed()

    def _forget_worker(self) -> None:
        self.worker = None
        self._model, self._heard, self._warm = "", "", False
        self._pulse = Pulse()

    def _enter(self, phase: Phase) -> None:
        self.phase, self._since, self._resend_at = phase, time.monotonic(), 0.0
        self._pool.changed()
