"""Rebuilding a session: the newest good snapshot, then the journal's operations after it.

Answers that were given are not given again: they are compared. Where snapshot, answer and this process have
the same deterministic fingerprint the numbers must be equal bit for bit; elsewhere they must agree within
the tolerance of the number format, and the run says from where on its bits are others. Nothing is decided
here about a mismatch but that it is found: the run is held, with both answers.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from schemas.errors import SignalError
from workers.engine.state import TrainerState
from workers.failpoints import hit
from workers.queue.journal import Journal
from workers.queue.records import STATEFUL, Outcome, Past
from workers.session.snapshots import Snapshots

log = logging.getLogger(__name__)

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}


class Replayable(Protocol):
    """What a rebuild asks of a session."""

    def load(self, state: TrainerState, state_seq: int) -> None:
        """Take over a state that was last changed at `state_seq`."""

    def redo(self, past: Past) -> Outcome:
        """Execute an operation of the past again, without committing it."""

    def clear(self) -> None:
        """Discard the accumulated gradients."""


@dataclass
class Rebuilt:
    """What a rebuild did: from which seq to which, how many answers it compared, what it found."""

    from_seq: int = 0
    to_seq: int = 0
    seconds: float = 0.0
    replay_s: float = 0.0
    compared: int = 0
    snapshot: str | None = None
    damaged: list[tuple[str, str]] = field(default_factory=list)
    mismatch: dict[str, Any] | None = None
    # Why bits may differ from those before, or None.
    other_bits: str | None = None

    def event(self) -> dict[str, Any]:
        """What the run's events say of it."""
        return {
            "from_seq": self.from_seq,
            "to_seq": self.to_seq,
            "seconds": round(self.seconds, 3),
            "replay_seconds": round(self.replay_s, 3),
            "compared": self.compared,
        }


@dataclass(frozen=True)
class Source:
    """A run whose journal is replayed, and the seq to arrive at."""

    run_id: str
    upto: int


class Rebuilder:
    """Brings a fresh session to the state of a run at a seq."""

    def __init__(
        self,
        journal: Journal,
        session: Replayable,
        fingerprint: dict[str, Any],
        fingerprint_id: str,
    ) -> None:
        """`fingerprint` is that of this process."""
        self._journal, self._session = journal, session
        self._fingerprint, self._id = fingerprint, fingerprint_id

    def restore(self, run_id: str, at_most: int | None = None, *, oldest: bool = False) -> Rebuilt:
        """Load the newest (or the oldest) good snapshot that is not beyond `at_most`, if there is one.

        Damaged ones are passed over and named. Raises SignalError state_mismatch, or OSError.
        """
        begun, found = time.monotonic(), Rebuilt()
        hit("restore.loading")
        snapshots = Snapshots(self._journal.storage, run_id)
        infos = [info for info in snapshots.infos() if at_most is None or info.seq <= at_most]
        for info in reversed(infos) if oldest else infos:
            try:
                state, facts = snapshots.load(info)
            except SignalError as error:
                found.damaged.append((info.key, error.message))
                continue
            self._take(state, facts, info.key, found)
            break
        found.seconds = time.monotonic() - begun
        return found

    def replay(self, source: Source, found: Rebuilt) -> None:
        """Execute the operations after the snapshot again. Raises SignalError history_gone or
        snapshot_damaged when they are not kept; RedisError, OSError."""
        begun = time.monotonic()
        hit("restore.replaying")
        found.to_seq = max(found.from_seq, source.upto)
        for past in self._journal.past(source.run_id, found.from_seq, source.upto):
            self._replay(past, found)
        found.replay_s = time.monotonic() - begun
        found.seconds += found.replay_s

    def _take(self, state: TrainerState, facts: dict[str, Any], key: str, found: Rebuilt) -> None:
        self._session.load(state, int(facts["state_seq"]))
        found.from_seq, found.snapshot = int(facts["seq"]), key
        if facts.get("fingerprint") != self._fingerprint:
            found.other_bits = self._why(facts.get("fingerprint") or {})

    def _replay(self, past: Past, found: Rebuilt) -> None:
        if past.record.get("effect") == "cleared":
            self._session.clear()
        if past.status != "completed" or past.kind not in STATEFUL:
            return
        outcome = self._session.redo(past)
        found.compared += 1
        if past.record.get("fingerprint") != self._id and found.other_bits is None:
            found.other_bits = "The answers were computed on another device or by another version."
        recorded, numbers = past.record.get("numbers", {}), outcome.record.get("numbers", {})
        if outcome.status != past.status:
            numbers = {"error": outcome.error}
        elif self._agree(recorded, numbers, past.record.get("fingerprint")):
            return
        if found.mismatch is None:
            log.critical("seq %d is rebuilt as %r, recorded is %r", past.seq, numbers, recorded)
            found.mismatch = {
                "seq": past.seq,
                "kind": past.kind,
                "recorded": recorded,
                "rebuilt": numbers,
                "snapshot": found.snapshot,
            }

    def _agree(
        self, recorded: dict[str, float], found: dict[str, float], fingerprint: str | None
    ) -> bool:
        if fingerprint == self._id and self._fingerprint.get("deterministic"):
            return recorded == found
        tolerance = TOLERANCE.get(str(self._fingerprint.get("dtype")), 1e-4)
        # Another version may say more than was recorded, never less.
        return recorded.keys() <= found.keys() and all(
            math.isclose(value, found[name], rel_tol=tolerance, abs_tol=tolerance)
            for name, value in recorded.items()
        )

    def _why(self, other: dict[str, Any]) -> str:
        names = sorted(
            name
            for name in {*other, *self._fingerprint}
            if other.get(name) != self._fingerprint.get(name)
        )
        return f"The state was computed with another {', '.join(names)}."
