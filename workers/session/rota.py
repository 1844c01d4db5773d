"""The sessions of one worker take turns.

Whichever run's doorbell rang, the run whose turn it is executes, one operation at a time. A long operation
stands still between its micro-batches for small ones of others, which do not stand still in turn: so a small
operation waits for one micro-batch, one slice, and its turn among the small ones, however long others are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from workers.executing import Executing
from workers.queue.journal import Closed, Fenced, Journal
from workers.queue.records import Taken
from workers.session.sampling import Sampler
from workers.session.turns import LEAST, Turns

if TYPE_CHECKING:
    from workers.session.session import Session

log = logging.getLogger(__name__)

# How often it is looked at what runs have to do whose doorbells were not heard yet.
LOOK_S = 0.005
# And how often for samples that have no place in a run's order.
LOOK_FREE_S = 0.02
# What others get, in seconds and in tokens, while a long operation stands still.
SLICE_S = 0.2
SLICE_TOKENS = 4096
# So long one message may keep the worker from its other messages, such as that of a run that comes.
STAY_S = 1.0
# What is done while another operation stands still: what computes on the base and ends soon.
_BRIEF = ("forward_backward", "forward", "optim_step")


class Rota:
    """The sessions, by run, and whose turn it is."""

    def __init__(
        self,
        journal: Journal,
        executing: Executing,
        sampler: Sampler,
        *,
        between: Callable[[], None],
        stopping: Callable[[], bool],
        drop: Callable[[str], None],
    ) -> None:
        """`between` is called between two operations and while one stands still, `stopping` tells whether
        nothing more is to be begun, and `drop` lets go of a run that is another's by now, or over."""
        self.sessions: dict[str, Session] = {}
        self.executing, self.sampler = executing, sampler
        self._journal, self._between, self._stopping = journal, between, stopping
        self._drop = drop
        self._turns = Turns()
        self._looked_at = self._looked_free_at = 0.0
        # When a run was last asked for its next operation.
        self._tried_at: dict[str, float] = {}
        self._standing_still = False
        # Runs whose bell is taken since their samples began: only a look at what is next frees it.
        self._unheard: set[str] = set()

    def join(self, session: Session) -> None:
        """Another run is here."""
        self.sessions[session.run_id] = session

    def leave(self, run_id: str) -> Session | None:
        """The run is not here any more; its session, if it was."""
        self._turns.forget(run_id)
        self._unheard.discard(run_id)
        self._tried_at.pop(run_id, None)
        session = self.sessions.pop(run_id, None)
        if session is not None:
            session.flights.abandon()
        return session

    def serve(self, run_id: str, until: int = 0) -> bool:
        """Execute by turns until the run's entry `until` is done, or it has nothing left to do (0).

        True when something is left to do, and the run is to be rung for again: it was cut short so that
        other messages are heard, or samples are under way. Raises RedisError or OSError.
        """
        leave_at = time.monotonic() + STAY_S
        self._turns.wants(run_id)
        self._looked_free_at = 0.0
        while self._goes_on(run_id, until):
            self._look()
            self._look_free()
            turn = self._turns.next()
            taken = None if turn is None else self._execute(turn)
            self._work_between(alone=taken is None)
            if taken is None and turn in (None, run_id) and not self._must_go_on():
                # A sample may have come while the worker listened: its bell was taken, so nobody rings.
                self._look_free(now=True)
                if not self._must_go_on():
                    return False
            if time.monotonic() > leave_at:
                return self._goes_on(run_id, until) or self._must_go_on()
        return self._must_go_on()

    def pause(self) -> None:
        """An operation stands still between two of its micro-batches: a slice for the others.

        Raises nothing: what is wrong with another run is not this operation's affair.
        """
        if self._standing_still:
            return
        self._serve_samples()
        due = time.monotonic() - self._looked_at >= LOOK_S
        if self._stopping() or not due or not self._others():
            return
        self._standing_still = True
        try:
            self._give_slice()
        except (RedisError, OSError) as error:
            log.warning("others could not be served meanwhile: %s", error)
        except Exception:
            log.exception("others could not be served meanwhile")
        finally:
            self._standing_still = False

    # --- samples ------------------------------------------------------------------------------

    def _serve_samples(self) -> None:
        """While an operation stands still. Raises nothing, as `pause`."""
        self._standing_still = True
        try:
            self._look_free()
            self._work_between(alone=False)
        except (RedisError, OSError) as error:
            log.warning("samples could not be served meanwhile: %s", error)
        finally:
            self._standing_still = False

    def _work_between(self, *, alone: bool) -> None:
        """A share for the samples under way; `alone`: nothing else is there to do."""
        self._between()
        if self.sampler.busy:
            with self.executing.of(self.sampler.oldest):
                if alone:
                    self.sampler.step()
                else:
                    self.sampler.share()
        self._settle()

    def _settle(self) -> None:
        for run_id, session in list(self.sessions.items()):
            if not session.flights.busy:
                continue
            if run_id == self.executing.now and session.flights.in_order:
                continue
            try:
                session.settle()
            except (Fenced, Closed) as error:
                self._let_go(run_id, error)
            else:
                self._hear(session)

    def _hear(self, session: Session) -> None:
        """Once the last of its samples has ended, it is to be looked at what is next."""
        if session.linger_s and not session.flights.busy:
            self._unheard.add(session.run_id)
            self._turns.wants(session.run_id)

    def _look_free(self, *, now: bool = False) -> None:
        """Begins samples that have no place in their run's order; `now`: however short ago it was looked."""
        if not now and time.monotonic() - self._looked_free_at < LOOK_FREE_S:
            return
        self._looked_free_at = time.monotonic()
        run_ids = list(self.sessions)
        for run_id, count in zip(run_ids, self._journal.count_free(run_ids), strict=True):
            if not count:
                continue
            try:
                self.sessions[run_id].admit_free()
            except (Fenced, Closed) as error:
                self._let_go(run_id, error)

    def _let_go(self, run_id: str, error: Exception) -> None:
        log.info("%s is let go of: %r", run_id, error)
        if run_id == self.executing.now:
            # Its operation stands still, and will see for itself.
            return
        self._drop(run_id)

    def _must_go_on(self) -> bool:
        """Whether samples are under way or not committed yet, or a bell is to be freed."""
        flying = any(session.flights.busy for session in self.sessions.values())
        return (flying or bool(self._unheard)) and not self._stopping()

    def _goes_on(self, run_id: str, until: int) -> bool:
        session = self.sessions.get(run_id)
        return session is not None and not self._stopping() and not session.has_done(until)

    def _execute(self, run_id: str) -> Taken | None:
        """The run's next operation; None when it has none, or is let go of."""
        session = self.sessions[run_id]
        self._unheard.discard(run_id)
        self._tried_at[run_id] = time.monotonic()
        try:
            with self.executing.of(run_id):
                taken = session.work(linger=len(self.sessions) == 1 and not self.sampler.busy)
        except (Fenced, Closed) as error:
            self._let_go(run_id, error)
            return None
        if taken is None:
            self._turns.rests(run_id)
        else:
            self._turns.paid(run_id, taken.tokens)
        return taken

    # --- what the others have to do -----------------------------------------------------------

    def _others(self) -> list[str]:
        return [run_id for run_id in self.sessions if run_id != self.executing.now]

    def _look(self) -> None:
        """Notes who has something to do; who is known to have needs no looking at."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        resting = [run_id for run_id in self.sessions if not self._turns.waits(run_id)]
        flying = [run_id for run_id in resting if self.sessions[run_id].flights.in_order]
        self._brief([run_id for run_id in resting if run_id not in flying])
        # Of a run whose samples are under way only another sample may begin: that can wait a little longer,
        # and whether there is one, taking it shows.
        for run_id in flying:
            if now - self._tried_at.get(run_id, 0.0) >= LOOK_FREE_S:
                self._turns.wants(run_id)

    def _brief(self, run_ids: Collection[str]) -> set[str]:
        """Those of these runs whose next operation is a small one; notes of all who have one."""
        if not run_ids:
            return set()
        known = [(run_id, self.sessions[run_id].epoch) for run_id in run_ids]
        found = set()
        for (run_id, _), ahead in zip(known, self._journal.peek(known), strict=True):
            if ahead.found in ("fenced", "closed"):
                self._drop(run_id)
            elif ahead.found == "entry":
                self._turns.wants(run_id)
                if ahead.kind in _BRIEF and ahead.tokens <= SLICE_TOKENS:
                    found.add(run_id)
        self._looked_at = time.monotonic()
        return found

    def _give_slice(self) -> None:
        left, until = SLICE_TOKENS, time.monotonic() + SLICE_S
        while left > 0 and time.monotonic() < until and not self._stopping():
            turn = self._turns.next(self._brief(self._others()))
            if turn is None:
                return
            with self.sessions[turn].trainer.base.set_aside():
                taken = self._execute(turn)
            left -= max(taken.tokens, LEAST) if taken is not None else 0
