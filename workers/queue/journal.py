"""The journal of a run: the one truth about what was asked, in which order, and how it ended.

Web tier, agent and workers use the same class; a worker's calls are fenced by the epoch of its lease. Here
is what appends, takes and commits; `history` reads, `supervision` is the agent's side. Touches Redis and,
for bodies and results over 64 KB, storage.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, cast

from schemas.errors import SignalError
from workers.queue import keys
from workers.queue.records import Ahead, Appended, NewEntry, Outcome, Past, Snapshot, Taken
from workers.queue.scripts import Behind, Closed, Fenced, Held, Missing, connect
from workers.queue.unordered import Unordered

__all__ = ["Behind", "Closed", "Fenced", "Held", "Journal", "Missing", "connect", "held_error"]

_OWN_KEY_TTL_S = 600


class Journal(Unordered):
    """All runs' journals on one Redis-protocol server."""

    # --- the web tier -------------------------------------------------------------------------

    def open_run(self, run_id: str, owner: str) -> None:
        """Make the journal of a new run; a repeat changes nothing."""
        self._call("open", run_id, owner, self.settings.result_ttl_s)

    def append(
        self, run_id: str, entries: Sequence[NewEntry], idempotency_key: str | None = None
    ) -> tuple[list[Appended], list[tuple[int, str]], bool]:
        """Append operations in order, all or none.

        Returns where each went, the (entry, kind) pairs that became eligible by this call, and
        whether the run's bell was free (for coalesced doorbells). `idempotency_key` begins with "c:" when
        it is a client's, with "r:" when it only guards against a repeated command. Raises SignalError:
        run_closed, run_paused, rolled_back, idempotency_conflict, client_seq_conflict, sequence_gap,
        queue_full, not_found.
        """
        s, key = self.settings, idempotency_key or ""
        digest = "-".join(entry.digest for entry in entries)
        args: list[Any] = [
            s.max_queued,
            s.max_queued_bytes,
            s.user_max_queued,
            s.user_max_queued_bytes,
            s.max_unsealed_bytes,
            s.gap_deadline_s,
            s.operation_deadline_s,
            key,
            digest,
            s.result_ttl_s if key.startswith("c:") else _OWN_KEY_TTL_S,
            secrets.token_hex(4),
            len(entries),
        ]
        refs = []
        for entry in entries:
            body, ref = self._store(run_id, entry.body)
            refs.append(ref)
            args += [entry.kind, body, ref, entry.tokens, entry.lane or ""]
            args += [
                "" if entry.client_seq is None else entry.client_seq,
                entry.on_error,
                entry.digest,
                len(entry.body),
                "" if entry.ordered else "1",
                entry.refused,
            ]
        reply = self._call("append", run_id, *args)
        if reply[0] != b"ok":
            # Nothing names what was stored for them, and the run may have been deleted meanwhile.
            for ref in filter(None, refs):
                self.storage.delete(ref)
            raise _append_error(reply, entries)
        split = reply.index(b"|")
        return _appended(reply[2:split]), _pairs(reply[split + 1 :]), reply[1] == b"1"

    def cancel(self, run_id: str, number: int) -> str:
        """Cancel an entry: "cancelled", "stopping" (a running sample), "already_running" or "finished"."""
        reply = self._call("cancel", run_id, number, json.dumps(SignalError("cancelled").to_dict()))
        return cast(bytes, reply[0]).decode()

    # --- the worker ---------------------------------------------------------------------------

    def report_ready(
        self,
        run_id: str,
        epoch: int,
        device: dict[str, Any],
        fingerprint: dict[str, Any] | None = None,
        rebuilt: dict[str, Any] | None = None,
        other_bits_since: int | None = None,
        *,
        state: dict[str, Any],
    ) -> None:
        """The session is in memory, in `state`; `rebuilt` says from what, and `other_bits_since` from which
        seq on its bits may differ from those before. Raises Fenced, Closed or Missing."""
        how, since = json.dumps(rebuilt) if rebuilt else "", other_bits_since
        self._fenced(
            self._call(
                "report", run_id, epoch, json.dumps(device), json.dumps(fingerprint or {}), how,
                "" if since is None else since, json.dumps(state),
            )
        )  # fmt: skip

    def take(self, run_id: str, epoch: int, *, listening: bool = False) -> Taken | None:
        """The next operation to execute, or None when none is eligible.

        `listening` keeps the bell taken: the worker will call `listen` and `take` again. Raises Fenced,
        Closed, Held or Missing.
        """
        return self._as_taken(run_id, self._call("take", run_id, epoch, "1" if listening else ""))

    def take_ahead(self, run_id: str, epoch: int, seq: int) -> Taken | None:
        """The operation at `seq`, behind samples that are being executed, if it is a sample too.

        Samples in a row see the same weights. Raises as `take`.
        """
        return self._as_taken(run_id, self._call("take_ahead", run_id, epoch, seq))

    def _as_taken(self, run_id: str, reply: list[Any]) -> Taken | None:
        if self._fenced(reply)[0] == b"empty":
            return None
        return self._taken(run_id, reply[1:])

    def peek(self, runs: Sequence[tuple[str, int]]) -> list[Ahead]:
        """What is next in several runs, each with the epoch of the caller's lease, without taking it."""
        replies = self._call_each("peek", runs)
        return [Ahead(reply[0].decode(), *_kind_and_tokens(reply)) for reply in replies]

    def listen(self, run_id: str, seconds: float) -> bool:
        """Wait a moment for an operation to become eligible; a stale yes is possible and harmless."""
        return self.redis.blpop([keys.prefix(run_id) + "ring"], timeout=seconds) is not None

    def store_result(self, run_id: str, outcome: Outcome) -> tuple[bytes, str]:
        """Puts a large result into storage, once: (inline bytes, ref). Raises SignalError storage_full."""
        return self._store(run_id, outcome.result)

    def commit(
        self,
        run_id: str,
        epoch: int,
        taken: Taken,
        outcome: Outcome,
        stored: tuple[bytes, str] | None = None,
    ) -> None:
        """End an operation. Safe to repeat; `stored` is its result by `store_result`, for repeats.

        Raises Fenced, Closed, Missing or Behind.
        """
        body, ref = stored or self.store_result(run_id, outcome)
        reply = self._call(
            "commit", run_id, epoch, taken.number, taken.seq, outcome.status, body, ref,
            json.dumps(outcome.error) if outcome.error else "", json.dumps(outcome.data),
            json.dumps(outcome.state), outcome.close_status, json.dumps(outcome.record), taken.tag,
        )  # fmt: skip
        self._fenced(reply)
        if reply[0] == b"behind":
            raise Behind(
                f"{run_id}: seq {taken.seq} was computed, the journal is at {int(reply[1])}"
            )

    def note_snapshot(self, run_id: str, epoch: int, found: Snapshot, branch_from: int) -> None:
        """A verified snapshot is in storage. Raises Fenced or Missing."""
        row = json.dumps(found.__dict__)
        self._fenced(self._call("snapshot", run_id, epoch, row, branch_from))

    def rewind(
        self,
        run_id: str,
        epoch: int,
        *,
        state_seq: int,
        known_from: int,
        recent: Sequence[Past] = (),
        data: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Put back commits that the journal has lost, up to the state at `state_seq`, and hold the run.

        `recent` are entries of consecutive seqs after `known_from`, with the projector's `data` of each;
        what waited in the journal ends in journal_lost. Raises Fenced, Closed or Missing.
        """
        args: list[Any] = [
            epoch,
            state_seq,
            known_from,
            json.dumps(SignalError("journal_lost").to_dict()),
            len(recent),
        ]
        for entry, extra in zip(recent, data, strict=True):
            fields = {**entry.fields(), "data": json.dumps(extra)}
            args += [entry.seq, entry.number, json.dumps(fields), entry.body, entry.result]
        self._fenced(self._call("rewind", run_id, *args))


def _appended(flat: Sequence[bytes]) -> list[Appended]:
    rows = [flat[i : i + 7] for i in range(0, len(flat), 7)]
    return [
        Appended(
            int(n),
            int(seq) if seq else None,
            status.decode(),
            replayed == b"1",
            float(at),
            int(applied),
            tag.decode(),
        )
        for n, seq, status, replayed, at, applied, tag in rows
    ]


def _kind_and_tokens(reply: list[Any]) -> tuple[str, int]:
    return (reply[1].decode(), int(reply[2])) if reply[0] == b"entry" else ("", 0)


def _pairs(flat: Sequence[bytes]) -> list[tuple[int, str]]:
    return [(int(flat[i]), flat[i + 1].decode()) for i in range(0, len(flat), 2)]


def held_error(hold: str, info: dict[str, Any]) -> SignalError:
    """What somebody is told who sends an operation to a held run; `data` says what to accept."""
    if hold == "rolled_back":
        return SignalError("rolled_back", data={"at_seq": info.get("at_seq", 0)})
    if hold == "mismatch":
        text = "The rebuilt run does not give the recorded numbers; resume with accept=rebuilt to go on."
        return SignalError("run_paused", text, data={"accept": "rebuilt", "seq": info.get("seq")})
    return SignalError("run_paused", data={"reason": info.get("reason", "user")})


def _append_error(reply: list[Any], entries: Iterable[NewEntry]) -> SignalError:
    code = reply[0].decode()
    if code == "missing":
        return SignalError("not_found", "There is no such run, or its records have expired.")
    if code == "closed":
        return SignalError(
            "run_closed", f"The run is {reply[1].decode()} and takes no more operations."
        )
    if code == "queue_full":
        whose = {
            b"run": "The run has {} unfinished operations",
            b"user": "Your runs have {} unfinished operations",
            b"unsealed": "The run's journal is waiting for a snapshot; it has {} unfinished operations",
        }[reply[2]]
        message = whose.format(int(reply[1])) + "; wait for some to finish."
        return SignalError("queue_full", message, data={"queued": int(reply[1])})
    if code == "held":
        return held_error(reply[1].decode(), json.loads(reply[2] or b"{}"))
    if code in ("client_seq_conflict", "sequence_gap"):
        entry = list(entries)[int(reply[1]) - 1]
        where = f"client_seq {entry.client_seq} of lane {entry.lane!r}"
        text = {
            "client_seq_conflict": "was sent before with another request",
            "sequence_gap": "came after its lane went on",
        }
        return SignalError(code, f"{where} {text[code]}.", param="client_seq")
    return SignalError(code)
