"""One lease on one worker: the run is brought in, followed while it is served, and taken out.

A worker may have several, each with a run and an epoch of its own; they know nothing of each other.

A state machine that `step` moves on without waiting: waiting → attaching → serving → detaching. It ends
with a parting (the worker has let go of the run) or with the loss of the worker; what becomes of the run
is decided in `gpu_pool.settlement`. Touches Redis by way of `journal` and `control`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

from gpu_pool import parting
from gpu_pool.control import Report
from gpu_pool.devices import Slot
from gpu_pool.leases import Lease
from gpu_pool.parting import Parting
from gpu_pool.pool import Pool
from gpu_pool.signs import Signs
from gpu_pool.workers import Worker
from workers.failpoints import hit
from workers.queue.app import wake
from workers.queue.records import Head

LOAD_DEADLINE_S = 600.0
DETACH_DEADLINE_S = 30.0
RESEND_S = 10.0
CONFIRMATIONS = 30
# So long a worker may take to mend a journal that is gone.
MEND_S = 30.0


class Stage(StrEnum):
    """How far a run has come on its worker."""

    WAITING = "waiting"
    ATTACHING = "attaching"
    SERVING = "serving"
    DETACHING = "detaching"


@dataclass(frozen=True)
class Loss:
    """The worker is of no use any more; `blame` when the running operation is why, `outside` when
    neither it nor the run's start is."""

    why: str
    blame: bool = False
    outside: bool = False


class Tenancy:
    """A run on the worker of a slot."""

    def __init__(self, lease: Lease, slot: Slot, pool: Pool, *, ready: bool = False) -> None:
        """`ready`: the worker, that of an earlier agent, serves the run already."""
        self.lease, self._slot, self._pool = lease, slot, pool
        # Whether the run was ready on this worker.
        self.ready = ready
        self.signs = Signs()
        # How run and worker part, once the worker is lost.
        self.parted: Parting | None = None
        self._why = parting.ENDED
        # Whether SQL was asked, after the journal had lost something.
        self._known_to_go_on = False
        self._unconfirmed = 0
        self._enter(Stage.SERVING if ready else Stage.WAITING)

    @property
    def leaving(self) -> bool:
        """True while the worker lets go of the run."""
        return self.stage == Stage.DETACHING

    @property
    def idle_s(self) -> float:
        """For how long the run, while it is served, has had nothing to do."""
        return self.signs.idle_s if self.stage == Stage.SERVING else 0.0

    def leave(self, why: Parting) -> None:
        """Has the worker let go of the run."""
        self._why = why
        # Of a run that goes on, the present operation ends first and a snapshot is written.
        goes_on = why in (parting.PAUSED, parting.LEFT)
        self._enter(Stage.DETACHING, self._pool.settings.hang_s if goes_on else DETACH_DEADLINE_S)

    def lose(self, loss: Loss, executed: str, last_words: str) -> None:
        """The worker is lost; `executed` names the run whose operation it was executing, "" for none.

        Nobody else is blamed, and a run that was on its way in has not failed to start by another's fault.
        """
        blame = loss.blame and executed == self.lease.run_id
        others = executed not in ("", self.lease.run_id)
        if self.ready or loss.outside or others:
            self.parted = parting.lost_worker(loss.why, blame=blame)
        else:
            self.parted = parting.failed_start(loss.why, last_words, blame=blame)

    def step(self, worker: Worker, report: Report | None) -> Parting | Loss | None:
        """Moves on as far as possible. May raise a connection error; then the next step tries the
        same again."""
        self.signs.hear(report)
        if self.stage == Stage.WAITING:
            return self._attach(worker)
        if self.stage == Stage.DETACHING:
            return self._detach(worker, report)
        return self._follow(worker, report)

    # --- in -----------------------------------------------------------------------------------

    def _attach(self, worker: Worker) -> Parting | Loss | None:
        if (refused := self._install(worker)) is not None:
            return refused
        hit("agent.placed")
        if self._pool.control.add_queue(worker.node, self.lease.run_id):
            worker.mark_log()
            self._enter(Stage.ATTACHING)
            self._send(worker)
            hit("agent.attached")
            return None
        # Counted, not timed: after an outage of Redis the worker needs a while to come back.
        self._unconfirmed += 1
        if self._unconfirmed >= CONFIRMATIONS:
            return Loss(f"it did not answer {CONFIRMATIONS} times")
        return None

    def _install(self, worker: Worker) -> Parting | None:
        """Lets the worker in and every earlier one out; the reason when it may not come in."""
        journal, lease = self._pool.journal, self.lease
        device = self._slot.for_run(self._pool.settings.host_name)
        if journal.install_epoch(lease.run_id, lease.epoch, worker.node, device):
            return None
        head = journal.head(lease.run_id)
        if head is None:
            return parting.JOURNAL_LOST
        if head.closed:
            return parting.ENDED
        ours = (head.epoch, head.worker) == (lease.epoch, worker.node)
        return None if ours else parting.SUPERSEDED

    def _send(self, worker: Worker) -> None:
        lease, wants = self.lease, self.lease.requirements
        standing = self._pool.standing(lease.run_id)
        spec = {
            "base_model": wants["base_model"],
            "config": wants["config"],
            "owner": wants.get("owner", ""),
            "origin": wants.get("origin"),
            "device": self._slot.for_run(self._pool.settings.host_name),
            "projected_seq": standing.known_seq if standing is not None else 0,
        }
        self._pool.control.attach(worker.node, lease.run_id, lease.epoch, spec)
        self._resend_at = time.monotonic() + RESEND_S

    # --- here ---------------------------------------------------------------------------------

    def _follow(self, worker: Worker, report: Report | None) -> Loss | None:
        """Wait until the run is ready, ring when its work stands still, see when it is to leave."""
        now, head = time.monotonic(), self._pool.journal.head(self.lease.run_id)
        absent_s = self.signs.absent_s(head, now)
        if head is None:
            self._mend(worker, absent_s, now)
            return None
        if head.epoch < self.lease.epoch:
            # The journal was rolled back to before this lease: the worker is let in once more.
            self._enter(Stage.WAITING)
            return None
        if (why := self._reason_to_leave(head)) is not None:
            self.leave(why)
            return None
        if (loss := self._stuck(head, now)) is not None:
            return loss
        self._serve(worker, head, report, now)
        return None

    def _serve(self, worker: Worker, head: Head, report: Report | None, now: float) -> None:
        self.signs.watch_idleness(head, now)
        if self.stage == Stage.ATTACHING and head.worker_state == "ready":
            self.ready = True
            self._enter(Stage.SERVING)
        elif report is not None and self.lease.run_id not in report.runs:
            if now >= self._resend_at:  # the broker lost the message, or the worker the run
                self._send(worker)
        elif self.stage == Stage.SERVING and self.signs.bell_is_due(head, now):
            wake(self._pool.app, head.run_id)

    def _mend(self, worker: Worker, absent_s: float, now: float) -> None:
        """The journal is gone: only the worker knows what was in it, unless the run has ended."""
        self._known_to_go_on = False
        if self._has_ended():
            self.leave(parting.ENDED)
        elif absent_s > MEND_S:
            self.leave(parting.JOURNAL_LOST)
        elif now >= self._resend_at:
            self._send(worker)

    def _reason_to_leave(self, head: Head) -> Parting | None:
        if head.closed:
            return parting.ENDED
        if head.epoch > self.lease.epoch:
            return parting.SUPERSEDED
        if head.hold == "paused":
            return parting.PAUSED
        if head.hold == "rolled_back" and self._has_ended():
            return parting.ENDED  # which the journal has lost
        if head.move == f"{self.lease.host}/{self.lease.slot}":
            return parting.LEFT
        return None

    def _has_ended(self) -> bool:
        """Whether SQL says so; asked once."""
        if not self._known_to_go_on:
            standing = self._pool.standing(self.lease.run_id)
            self._known_to_go_on = standing is not None and standing.leased
        return not self._known_to_go_on

    def _stuck(self, head: Head, now: float) -> Loss | None:
        if self.stage == Stage.ATTACHING:
            seconds = self.signs.loading_s(now)
            if seconds > LOAD_DEADLINE_S:
                return Loss(f"it made no progress with loading the run for {seconds:.0f} s")
            return None
        seconds = self.signs.stuck_s(head, now)
        if seconds > self._pool.settings.hang_s:
            return Loss(f"an operation made no progress for {seconds:.0f} s", blame=True)
        return None

    # --- out ----------------------------------------------------------------------------------

    def _detach(self, worker: Worker, report: Report | None) -> Parting | Loss | None:
        now, run_id = time.monotonic(), self.lease.run_id
        if now >= self._resend_at:
            self._resend_at = now + RESEND_S
            self._pool.control.drop_queue(worker.node, run_id)
            self._pool.control.detach(worker.node, run_id)
        elif report is not None and run_id not in report.runs:
            return self._why
        elif now >= self._deadline and worker.executing() in ("", run_id):
            # Otherwise another's operation must end first; whether that hangs, its own tenancy sees.
            return Loss("it did not let go of its run in time")
        return None

    def _enter(self, stage: Stage, deadline_s: float = 0.0) -> None:
        self.stage, self._deadline = stage, time.monotonic() + deadline_s
        self._resend_at, self._unconfirmed = 0.0, 0
        self._pool.changed()
