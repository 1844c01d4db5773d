"""Kills at exact stages: which there are, how one is carried out beside a running loop, what it cost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.chaos.harness import Chaos, kill, quietly
from tests.support.api import Run
from tests.support.inside import until

KINDS = ("forward_backward", "optim_step", "sample", "save_state")
# Stages of every operation, in the worker's child.
OPERATION = ("received", "computed", "applied", "committing", "committed")
# Stages of a snapshot and of what it allows to be trimmed, in the background of the same process.
SNAPSHOT = (
    "snapshot.captured", "snapshot.filling", "snapshot.tensors", "snapshot.renaming",
    "snapshot.renamed", "snapshot.verified", "journal.sealing", "journal.trimmed",
)  # fmt: skip
# Stages that only a worker's death leads to, so that each of these is a second blow.
RESTORE = ("restore.loading", "restore.replaying")
AGENT = ("agent.leased", "agent.placed", "agent.attached")
WEB = ("web.appended", "web.rang")
STAGES = (*OPERATION, *SNAPSHOT, *RESTORE, *AGENT, *WEB)
SELF = "itself"
VICTIMS = (
    "worker_child", "worker_parent", "agent", "web_master", "web_worker", "redis", "projector",
)  # fmt: skip


@dataclass
class Strike:
    """One kill: while somebody stands at `stage` (in an operation of `kind`), `victim` is killed.

    The victim SELF is whoever came to the stage, and dies in the middle of it.
    """

    stage: str
    victim: str
    kind: str = ""
    after: int = 0
    # What came of it.
    hit: bool = False
    killed_at: float | None = None
    back_s: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """For people and for the report."""
        return f"{self.victim} at {self.stage}{f' of {self.kind}' if self.kind else ''}"

    @property
    def needs_a_death(self) -> bool:
        """Whether the stage is only come by when a worker has died before."""
        return self.stage in (*RESTORE, *AGENT)


@dataclass
class Striker:
    """Carries out strikes one after the other beside a loop, evenly over its operations."""

    chaos: Chaos
    run: Run
    strikes: Sequence[Strike]
    operations: Sequence[dict[str, Any]]
    chance: random.Random
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _armed: str = ""

    def __post_init__(self) -> None:
        share = len(self.operations) // (len(self.strikes) + 1)
        self._when: dict[int, Strike] = {}
        for number, strike in enumerate(self.strikes):
            first = 4 + number * share
            self._when[self._index(strike, first, first + max(1, share // 2))] = strike

    def _index(self, strike: Strike, first: int, last: int) -> int:
        """A place between these two; ahead of an operation of the strike's kind, if it has one."""
        index = self.chance.randrange(first, last)
        kinds = [one["kind"] for one in self.operations]
        if strike.kind:
            index = kinds.index(strike.kind, index if strike.kind in kinds[index:] else 0)
        while index in self._when:
            index -= 1
        return index

    def before(self, index: int) -> None:
        """Called ahead of every operation: begins the strike that is due there, one at a time."""
        strike = self._when.get(index)
        if strike is not None:
            self.finish()
            self._arm(strike)
            self._thread = threading.Thread(target=self._guarded, args=(strike,), daemon=True)
            self._thread.start()
        elif self._thread is not None and self._thread.is_alive():
            # The course is short: it must not be over before what it is disturbed by has happened.
            self._thread.join(60.0 if self.chaos.points.hit(self._armed) else 0.1)

    def finish(self) -> None:
        """The strike under way has come to its end. Raises what it raised."""
        if self._thread is not None:
            self._thread.join(90)
            assert not self._thread.is_alive(), "a strike does not end"
        if self._error is not None:
            raise self._error

    def _guarded(self, strike: Strike) -> None:
        try:
            self._strike(strike)
        except BaseException as error:
            self._error = error

    def _arm(self, strike: Strike) -> None:
        self._armed = strike.stage
        action = "kill" if strike.victim == SELF else "wait"
        self.chaos.points.arm(strike.stage, action, when=strike.kind, after=strike.after)
        if strike.needs_a_death:
            first = self.chaos.victim("worker_child", self.run.id)
            if first is not None:
                kill(first)

    def _strike(self, strike: Strike) -> None:
        points, applied = self.chaos.points, self.chaos.applied(self.run.id)
        found = self._await_hit(strike)
        if found is None:
            points.disarm(strike.stage)
            strike.note = "not passed"
            return
        strike.hit = True
        if strike.victim == SELF:
            strike.killed_at = found
        else:
            self._kill(strike)
            points.release(strike.stage)
        self._await_progress(applied)
        points.disarm(strike.stage)

    def _await_hit(self, strike: Strike) -> float | None:
        """When somebody came to the stage; None when the loop passes it no more."""
        deadline = time.monotonic() + (20 if strike.needs_a_death else 6)
        while (found := self.chaos.points.hit(strike.stage)) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return found.at

    def _kill(self, strike: Strike) -> None:
        victim = self.chaos.victim(strike.victim, self.run.id)
        if victim is None:
            strike.note = "nobody there"
            return
        strike.killed_at = kill(victim)

    def _await_progress(self, applied: int) -> None:
        """Until an operation is committed again, or there is none to commit."""

        def look() -> bool | None:
            head = self.chaos.head(self.run.id)
            if not head:
                return None
            now, entries = int(head["applied"]), int(head["entries"])
            return now > applied or now == entries or None

        until(quietly(look), 60)


def measure(chaos: Chaos, run: Run, strikes: Sequence[Strike]) -> None:
    """Fills in the seconds from each kill to the next committed operation, by the journal's times."""
    times, after = [], 0
    while rows := run.get("/operations", params={"after_seq": after, "limit": 100}).json()["data"]:
        after = rows[-1]["seq"]
        times += [_epoch(row["finished_at"]) for row in rows if row["finished_at"]]
    for strike in strikes:
        if strike.killed_at is None:
            continue
        later = [one for one in times if one > strike.killed_at]
        strike.back_s = round(min(later) - strike.killed_at, 3) if later else None


def _epoch(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
