"""One run in a worker: takes the journal's entries in order, executes them, commits the outcomes.

State, position and the outcome that is not yet committed are one unit: when a commit fails it is
retried, never the operation, since executing an optimizer step twice would change the numbers. When the
journal turns out to have lost commits, they are put back from memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.info import fingerprint, fingerprint_id
from workers.engine.state import TrainerState
from workers.failpoints import hit
from workers.queue.journal import Behind, Closed, Held, Journal, Missing
from workers.queue.records import Outcome, Past, Taken
from workers.session.events import OperationEvents
from workers.session.flights import Flight, Flights
from workers.session.primitives import Abandoned, Primitives
from workers.session.recent import Commit, Recent
from workers.session.sampling import Sampler
from workers.session.snapshots import Snapshots
from workers.session.snapshotting import Copied, Snapshotter
from workers.session.training import make_trainer
from workers.session.weights import Sources
from workers.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

LINGER_S = 0.02
# More than the doorbells that can be under way for finished entries.
DONE_KEPT = 20_000
COMMIT_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass
class Pending:
    """An outcome that is not committed yet; its result is stored once."""

    taken: Taken
    outcome: Outcome
    stored: tuple[bytes, str] | None = None


@dataclass(frozen=True)
class Worker:
    """What a session needs of the process that holds it.

    `beat` is called at every sign of progress; `stopping` tells whether to stop after this operation;
    `pause` is called where others may be served before it goes on.
    """

    node: str
    events: OperationEvents
    beat: Callable[[], None]
    stopping: Callable[[], bool]
    pause: Callable[[], None] = lambda: None
    sampler: Sampler = field(default_factory=Sampler)


class Session:
    """A run's adapter, optimizer and place in its journal."""

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        epoch: int,
        spec: dict[str, Any],
        base: Base,
        model_folder: Path,
        worker: Worker,
    ) -> None:
        """`spec` is what the agent sent: base_model, the resolved config, the device, the owner."""
        config = spec["config"]
        self.journal, self.run_id, self.epoch, self.worker = journal, run_id, epoch, worker
        self.owner: str = spec["owner"]
        self.trainer = make_trainer(base, config)
        self.dtype: str = base.dtype_name
        self.device: dict[str, Any] = {**spec["device"], "dtype": self.dtype}
        self.fingerprint = fingerprint(base)
        self.fingerprint_id = fingerprint_id(self.fingerprint)
        self.primitives = Primitives(
            run_id,
            spec["base_model"],
            config,
            self.trainer,
            load_tokenizer(model_folder),
            journal.storage,
            (self.fingerprint_id, self.fingerprint),
        )
        self.primitives.extra_state = self._recovery
        worker.sampler.use(base)
        self.flights = Flights(
            journal,
            (run_id, epoch),
            worker.sampler,
            Sources(self.trainer, journal.storage),
            self.primitives.tokenizer,
            config["seed"],
            self.primitives.sampled,
            self.primitives.failed,
        )
        # With one message for many operations, a worker that has just finished one listens a moment
        # for the next: a loop that waits for each result then costs no message at all.
        self.linger_s = LINGER_S if journal.settings.doorbell == "coalesced" else 0.0
        # The last seq whose effect, if it has one, is in memory.
        self.applied = 0
        self.entries = 0
        # What a rebuild costs before it replays anything; the host knows it better once it has loaded.
        self.start_s = 5.0
        self._pending: Pending | None = None
        self._done: dict[int, None] = {}
        self.recent = Recent(0, 2 * journal.settings.snapshot_max_bytes)
        self.snapshots = Snapshotter(
            journal,
            Snapshots(journal.storage, run_id),
            run_id,
            epoch,
            self.recent.forget,
            rooted=not spec.get("origin"),
        )

    # --- a rebuild's view ---------------------------------------------------------------------

    def load(self, state: TrainerState, state_seq: int) -> None:
        """Take over a state that was last changed at `state_seq`."""
        self.trainer.restore(state)
        self.primitives.state_seq = state_seq

    def redo(self, past: Past) -> Outcome:
        """Execute an operation of the past again, without committing it. Raises Abandoned."""
        self.worker.beat()
        if self.worker.stopping():
            raise Abandoned
        self.worker.pause()
        body = self.journal.body(past.body_ref, past.body)
        taken = _as_taken(self.run_id, past, body)
        if taken.kind == "sample":
            return self.flights.alone(taken)
        return self.primitives.execute(taken, past.record.get("plan"))

    def clear(self) -> None:
        """Discard the accumulated gradients."""
        self.trainer.clear_accumulation()

    def stand_at(self, applied: int, entries: int, base: int) -> None:
        """The session is in memory as it is after `applied`; `base` is the journal's sealed seq."""
        self.applied, self.entries = applied, entries
        self.recent.reset(base)
        for past in self.journal.past(self.run_id, base, applied):
            self.recent.add(Commit(past, {}))

    # --- the work -----------------------------------------------------------------------------

    def drain(self, until: int = 0) -> None:
        """Apply eligible entries in order, up to the entry `until`, or all of them (0), as `work` does."""
        self._commit_pending()
        while not self.has_done(until):
            self.admit_free()
            if self.work() is not None:
                continue
            if not self.flights.busy or self.worker.stopping():
                return
            self.worker.sampler.step()
            self.settle()

    def has_done(self, number: int) -> bool:
        """Whether the entry was applied. A message per operation stops at its own entry, so that messages
        are used up as fast as entries are."""
        return number in self._done

    def work(self, *, linger: bool = True) -> Taken | None:
        """Apply the next eligible entry, or begin it where it is a sample: which it was, or None when there
        is none, it must wait for samples before it, or the worker stops.

        `linger`: wait a moment for one to come, where that saves a message. Raises Fenced, Closed, or a
        RedisError on reading.
        """
        self._commit_pending()
        self._land()
        if self.worker.stopping() or (taken := self._next(linger)) is None:
            return None
        hit("received", taken.kind)
        self._note_skipped(taken)
        self.worker.events.started(taken)
        self.worker.beat()
        if taken.kind == "sample":
            self.flights.begin(taken)
            self._land()
            return taken
        outcome = self.primitives.execute(taken)
        hit("applied", taken.kind)
        self._pending = Pending(taken, outcome)
        self._commit_pending()
        self.worker.beat()
        if taken.kind == "load_state" and outcome.status == "completed":
            # What it was loaded from may be deleted: from now on the run needs it no more.
            self.snapshot_now()
        elif self.snapshots.due(light=self._is_light()):
            self.snapshots.begin(self._copy())
        return taken

    # --- samples ------------------------------------------------------------------------------

    def admit_free(self) -> None:
        """Begin samples that have no place in the order. Raises Fenced, Closed or a RedisError."""
        room = self.flights.room
        try:
            for taken in self.journal.take_free(self.run_id, self.epoch, room) if room else ():
                self.worker.events.started(taken)
                self.flights.begin(taken)
        except (Held, Missing):
            return

    def settle(self) -> None:
        """Commit the samples that have ended. Raises Fenced, Closed or a RedisError: then what is left is
        committed by the next call."""
        for flight in self.flights.ended_free():
            try:
                self._commit_free(flight)
            except Missing:
                # Its journal is gone, and with it whoever could ask for it.
                self._mend()
        self._commit_pending()
        self._land()

    def _commit_free(self, flight: Flight) -> None:
        taken, outcome = flight.taken, flight.outcome
        assert outcome is not None
        if flight.stored is None:
            try:
                flight.stored = self.journal.store_result(self.run_id, outcome)
            except SignalError as error:
                outcome = flight.outcome = Outcome("failed", error=error.to_dict())
                flight.stored = (b"", "")
        hit("committing", taken.kind)
        self.journal.commit_free(self.run_id, self.epoch, taken, outcome, flight.stored)
        hit("committed", taken.kind)
        self.flights.free.pop(taken.number, None)
        self._note_done(taken.number)
        self.flights.over(flight)
        self.worker.events.finished(taken, outcome)

    def _land(self) -> None:
        """Commit samples in order, as far as they have ended."""
        waiting = self.flights.in_order
        while waiting and waiting[0].outcome is not None:
            flight: Flight = waiting.popleft()
            assert flight.outcome is not None
            hit("applied", flight.taken.kind)
            # Whoever cancelled it knew nothing of the session.
            outcome = replace(flight.outcome, state=self.primitives.state())
            self._pending = Pending(flight.taken, outcome)
            self._commit_pending()
            self.flights.over(flight)

    def _next(self, linger: bool) -> Taken | None:
        if self.flights.in_order:
            return self._next_in_flight()
        try:
            return self._listen_for_next() if linger and self.linger_s else self._take()
        except Held:
            return None
        except Missing:
            self._mend()
            return None

    def _next_in_flight(self) -> Taken | None:
        """Only another sample may begin while some are under way: it sees the same weights."""
        if not self.flights.room:
            return None
        last = self.flights.in_order[-1].taken
        try:
            return self.journal.take_ahead(self.run_id, self.epoch, last.seq + 1)
        except (Held, Missing):
            return None

    def _take(self, *, listening: bool = False) -> Taken | None:
        return self.journal.take(self.run_id, self.epoch, listening=listening)

    def _listen_for_next(self) -> Taken | None:
        while True:
            taken = self._take(listening=True)
            if taken is not None:
                return taken
            if self.journal.count_free([self.run_id])[0]:
                # What has no place in the order is here already; the bell stays taken until it has ended.
                return None
            self.worker.events.flush()
            if not self.journal.listen(self.run_id, self.linger_s):
                return self._take()

    def _note_skipped(self, taken: Taken) -> None:
        """Entries that ended before their turn belong to what is known of the past."""
        if self.flights.in_order:
            return
        if taken.seq > self.applied + 1:
            for past in self.journal.past(self.run_id, self.applied, taken.seq - 1):
                self.recent.add(Commit(past, {}))
            self.applied = taken.seq - 1

    def _commit_pending(self) -> None:
        attempt = 0
        while self._pending is not None:
            taken = self._pending.taken
            try:
                self._commit(self._pending)
            except (RedisError, OSError) as error:
                wait = COMMIT_RETRY_S[min(attempt, len(COMMIT_RETRY_S) - 1)]
                log.warning(
                    "commit of seq %d of %s is tried again in %g s: %s",
                    taken.seq,
                    self.run_id,
                    wait,
                    error,
                )
                time.sleep(wait)
                self.worker.beat()
                attempt += 1
            except SignalError as error:
                # The result itself cannot be stored (a full disk): the operation's effect stands, and
                # its future says why there is no result to read.
                old = self._pending.outcome
                outcome = Outcome(
                    "failed",
                    error=error.to_dict(),
                    data=old.data,
                    state=old.state,
                    record={**old.record, "effect": "stands"},
                )
                self._pending = Pending(taken, outcome)
            except (Behind, Missing):
                self._mend()

    def _commit(self, pending: Pending) -> None:
        taken, outcome = pending.taken, pending.outcome
        if pending.stored is None:
            pending.stored = self.journal.store_result(self.run_id, outcome)
        hit("committing", taken.kind)
        self.journal.commit(self.run_id, self.epoch, taken, outcome, pending.stored)
        hit("committed", taken.kind)
        self._committed(pending)
        self.worker.events.finished(taken, outcome)

    def _committed(self, pending: Pending) -> None:
        taken, stored = pending.taken, pending.stored or (b"", "")
        self._pending = None
        self.applied, self.entries = taken.seq, max(self.entries, taken.number)
        past = _as_past(taken, pending.outcome, stored)
        self.recent.add(Commit(past, pending.outcome.data))
        self.snapshots.count(len(past.body) + len(past.result))
        self._note_done(taken.number)

    def _note_done(self, number: int) -> None:
        self._done[number] = None
        if len(self._done) > DONE_KEPT:
            del self._done[next(iter(self._done))]

    def _mend(self) -> None:
        """The journal has lost what this process did, or all: put it back, and hold the run.

        May raise a RedisError; then the next doorbell tries again.
        """
        # What waited in the lost journal has ended there.
        self.flights.abandon()
        if self._pending is not None:
            self._pending.stored = self._pending.stored or (b"", "")
            self._committed(self._pending)
        known_from, commits = self.recent.all()
        log.warning("%s: the journal has lost commits; they are put back", self.run_id)
        self.journal.reopen(
            self.run_id, self.owner, applied=known_from, entries=self.entries, epoch=self.epoch,
            worker=self.worker.node, base=known_from, at_seq=self.applied,
        )  # fmt: skip
        self.journal.rewind(
            self.run_id,
            self.epoch,
            state_seq=self.applied,
            known_from=known_from,
            recent=[commit.past for commit in commits],
            data=[commit.data for commit in commits],
        )
        self.journal.report_ready(
            self.run_id, self.epoch, self.device, self.fingerprint, state=self.primitives.state()
        )
        self.snapshots.tell_again()

    # --- snapshots ----------------------------------------------------------------------------

    def snapshot_now(self) -> bool:
        """Write a snapshot before going on, if anything changed since the last; False when it failed."""
        if self._pending is not None:
            return False
        return self.snapshots.write_now(self._copy())

    def _is_light(self) -> bool:
        """Whether a copy is no larger than it must be: accumulated gradients are as large as what they
        are of, which counts where that is a whole model."""
        return bool(self.primitives.config["lora_r"]) or not self.trainer.accumulated

    def _copy(self) -> Copied:
        begun = time.monotonic()
        state = self.trainer.capture()
        facts = {
            "run_id": self.run_id,
            "seq": self.applied,
            "epoch": self.epoch,
            "entries": self.entries,
            "owner": self.owner,
            "base_model": self.primitives.base_model,
            "config": self.primitives.config,
            "state_seq": self.primitives.state_seq,
            "fingerprint": self.fingerprint,
        }
        return Copied(state, facts, time.monotonic() - begun, self.primitives.executed_s)

    def _recovery(self) -> dict[str, Any]:
        since = self.primitives.executed_s - self.snapshots.executed_s
        return {"recovery_s": round(self.start_s + since, 3)}

    def close(self) -> None:
        """Leave the run to its next worker: with a last snapshot, if the journal is not closed."""
        self.flights.abandon()
        try:
            self._commit_pending()
            self.snapshot_now()
        except (RedisError, OSError, SignalError, Closed) as error:
            log.warning("%s is left without a last snapshot: %s", self.run_id, error)


def _as_taken(run_id: str, past: Past, body: bytes) -> Taken:
    return Taken(
        run_id=run_id,
        number=past.number,
        seq=past.seq,
        kind=past.kind,
        body=body,
        body_ref=past.body_ref,
        submitted_at=past.submitted_at,
        started_at=past.started_at or past.submitted_at,
        tokens=past.tokens,
        doomed_by=None,
        tag=past.tag,
        lane=past.lane,
        client_seq=past.client_seq,
        digest=past.digest,
    )


def _as_past(taken: Taken, outcome: Outcome, stored: tuple[bytes, str]) -> Past:
    return Past(
        seq=taken.seq,
        number=taken.number,
        tag=taken.tag,
        kind=taken.kind,
        status=outcome.status,
        submitted_at=taken.submitted_at,
        started_at=taken.started_at,
        finished_at=time.time(),
        tokens=taken.tokens,
        lane=taken.lane,
        client_seq=taken.client_seq,
        digest=taken.digest,
        body=b"" if taken.body_ref else taken.body,
        body_ref=taken.body_ref,
        result=stored[0],
        result_ref=stored[1],
        error=outcome.error,
        record=outcome.record,
    )
