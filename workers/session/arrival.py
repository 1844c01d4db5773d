"""How a session comes to stand where its run is: fresh, from a branch or an artifact, or rebuilt.

Decides by the journal, the snapshots and what SQL has seen, and says in the journal what was found. Every
way ends with a session that may take the next operation, or with a hold on the run that says why not.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from schemas.errors import SignalError
from workers.queue.journal import Journal, Missing
from workers.queue.records import Head
from workers.session.artifacts import load_artifact
from workers.session.restore import Rebuilder, Rebuilt, Source
from workers.session.session import Session

log = logging.getLogger(__name__)


def arrive(session: Session, spec: dict[str, Any], load_s: float) -> None:
    """Bring a new session to its run's place and report it ready.

    `load_s` is what loading the base took. Raises Fenced, Closed, Missing, a SignalError when the state
    cannot be had, RedisError or OSError.
    """
    journal, run_id, epoch = session.journal, session.run_id, session.epoch
    begun = time.monotonic()
    head = journal.head(run_id)
    if head is None:
        raise Missing
    rebuilt = _rebuild(session, head, spec)
    _tell_damaged(journal, run_id, rebuilt)
    applied = rebuilt.to_seq
    lost = applied != head.applied or int(spec.get("projected_seq") or 0) > applied
    if lost:
        journal.rewind(run_id, epoch, state_seq=applied, known_from=applied)
    session.stand_at(applied, head.entries, max(head.base, applied) if lost else head.base)
    if applied == 0 and spec.get("origin"):
        session.snapshot_now()  # from now on it needs its origin no more
    session.start_s = load_s + time.monotonic() - begun - rebuilt.replay_s
    _report(session, head, rebuilt)


def _rebuild(session: Session, head: Head, spec: dict[str, Any]) -> Rebuilt:
    rebuilder = Rebuilder(session.journal, session, session.fingerprint, session.fingerprint_id)
    found = rebuilder.restore(session.run_id)
    if found.snapshot is not None:
        session.snapshots.found(found.from_seq)
    elif spec.get("origin"):
        _originate(session, rebuilder, spec["origin"])
    try:
        rebuilder.replay(Source(session.run_id, head.applied), found)
    except SignalError as error:
        if found.snapshot is None or error.code not in ("history_gone", "snapshot_damaged"):
            raise
        # What led from the snapshot to the journal's end is lost, with a snapshot that was newer.
        log.critical("%s goes back to seq %d: %s", session.run_id, found.from_seq, error.message)
        damaged, found = found.damaged, rebuilder.restore(session.run_id, found.from_seq)
        found.damaged, found.to_seq = damaged, found.from_seq
    return found


def _originate(session: Session, rebuilder: Rebuilder, origin: dict[str, Any]) -> None:
    """The state that a run begins with: another run's at a seq, or a saved artifact."""
    if origin.get("artifact"):
        load_artifact(
            session.journal.storage,
            origin["artifact"],
            session.trainer,
            optimizer=bool(origin.get("optimizer")),
            sha256=origin.get("sha256"),
        )
        return
    source = Source(origin["run_id"], int(origin["seq"]))
    found = rebuilder.restore(source.run_id, source.upto, oldest=origin.get("from") == "oldest")
    if found.snapshot is None and found.damaged:
        # It may itself have begun from another state than its seed's.
        raise SignalError("history_gone", "No snapshot of the run is whole.")
    own = session.trainer.settings
    # What was done there was done by that run's settings; a branch may have others.
    session.trainer.settings = replace(own, **origin.get("settings", {}))
    rebuilder.replay(source, found)
    session.trainer.settings = own
    # The seqs of the other run mean nothing in this one.
    session.primitives.state_seq = 0
    if found.mismatch is not None:
        raise SignalError("replay_mismatch", data=found.mismatch)


def _tell_damaged(journal: Journal, run_id: str, rebuilt: Rebuilt) -> None:
    for key, what in rebuilt.damaged:
        log.error("snapshot %s is not used: %s", key, what)
        journal.note(run_id, "snapshot_damaged", {"key": key, "message": what})


def _report(session: Session, head: Head, rebuilt: Rebuilt) -> None:
    journal, run_id, epoch = session.journal, session.run_id, session.epoch
    again = head.worker_state == "rebuilding" or head.applied > 0
    since = None
    if rebuilt.other_bits is not None and again:
        since = session.applied
        journal.note(run_id, "nondeterministic", {"since_seq": since, "why": rebuilt.other_bits})
    if rebuilt.mismatch is not None:
        journal.hold(run_id, "mismatch", rebuilt.mismatch)
    journal.report_ready(
        run_id,
        epoch,
        session.device,
        session.fingerprint,
        rebuilt.event() if again else None,
        since,
        state=session.primitives.state(),
    )
