"""The journal of a run: the one truth about what was asked, in which order, and how it ended.

Every change is one Lua script (`lua/`), so it happens whole or not at all. Web tier, agent and
workers use the same class; a worker's calls are fenced by the epoch of its lease. Touches Redis and,
for bodies and results over 64 KB, storage.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, cast

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from schemas.errors import SignalError
from workers.queue import keys
from workers.queue.records import Appended, Entry, Head, NewEntry, Outcome, Taken
from workers.settings import Settings
from workers.storage import Storage

_SCRIPTS = ("append", "take", "commit", "close", "cancel", "open", "place", "report", "expire")


class Fenced(Exception):
    """Another worker has the run's lease: this one must let go of it."""


class Closed(Exception):
    """The run has ended: there is nothing more to do for it."""


class Behind(Exception):
    """The journal lacks commits that this worker made: its memory is not the truth any more."""


def connect(url: str, *, timeout_s: float = 5.0) -> Redis:
    """A client that gives up within seconds. redis-py's own defaults may hold a caller for a minute."""
    retry = Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), retries=2)
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=2.0,
        retry=retry,
        health_check_interval=30,
    )


class Journal:
    """All runs' journals on one Redis-protocol server."""

    def __init__(self, redis: Redis, storage: Storage, settings: Settings) -> None:
        """`storage` takes what is too large for Redis."""
        self.redis, self.storage, self.settings = redis, storage, settings
        folder = resources.files("workers.queue") / "lua"
        prelude = (folder / "prelude.lua").read_text()
        self._scripts = {
            name: redis.register_script(prelude + (folder / f"{name}.lua").read_text())
            for name in _SCRIPTS
        }

    # --- the web tier -------------------------------------------------------------------------

    def open_run(self, run_id: str, owner: str) -> None:
        """Make the journal of a new run; a repeat changes nothing."""
        self._call("open", run_id, secrets.token_hex(4), owner)

    def append(
        self, run_id: str, entries: Sequence[NewEntry], idempotency_key: str | None = None
    ) -> tuple[list[Appended], list[tuple[int, str]], bool]:
        """Append operations in order, all or none.

        Returns where each went, the (entry, kind) pairs that became eligible by this call, and
        whether the run's bell was free (for coalesced doorbells). Raises SignalError: run_closed,
        idempotency_conflict, client_seq_conflict, sequence_gap, queue_full, not_found.
        """
        s = self.settings
        digest = "-".join(entry.digest for entry in entries)
        args: list[Any] = [
            s.max_queued,
            s.gap_deadline_s,
            s.operation_deadline_s,
            idempotency_key or "",
            digest,
        ]
        args.append(len(entries))
        for entry in entries:
            body, ref = self._store(run_id, entry.body)
            args += [entry.kind, body, ref, entry.tokens, entry.lane or ""]
            args += [
                "" if entry.client_seq is None else entry.client_seq,
                entry.on_error,
                entry.digest,
            ]
        reply = self._call("append", run_id, *args)
        if reply[0] != b"ok":
            raise _append_error(reply, entries)
        split = reply.index(b"|")
        return _appended(reply[2:split]), _pairs(reply[split + 1 :]), reply[1] == b"1"

    def head(self, run_id: str) -> Head | None:
        """The run as a whole; None when its journal is gone or was never made."""
        return self.heads([run_id])[0]

    def heads(self, run_ids: Sequence[str]) -> list[Head | None]:
        """`head` of several runs in one round trip."""
        pipe = self.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.hgetall(keys.prefix(run_id) + "head")
            pipe.llen(keys.prefix(run_id) + "order")
        rows = pipe.execute()
        return [
            Head.from_redis(run_id, rows[2 * i], rows[2 * i + 1]) if rows[2 * i] else None
            for i, run_id in enumerate(run_ids)
        ]

    def entries(self, run_id: str, numbers: Sequence[int]) -> list[Entry | None]:
        """Entries by number; None for one that never was or has expired."""
        pipe = self.redis.pipeline(transaction=False)
        for number in numbers:
            pipe.hgetall(f"{keys.prefix(run_id)}e:{number}")
        rows = pipe.execute()
        return [
            Entry.from_redis(run_id, n, row) if row else None
            for n, row in zip(numbers, rows, strict=True)
        ]

    def finished_after(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        """Finished entries with a seq above `after_seq`, in order, at most `limit`."""
        head = cast(
            list[bytes | None],
            self.redis.hmget(keys.prefix(run_id) + "head", ["applied", "closed"]),
        )
        # A run that has ended has no unfinished operation, whatever was applied.
        last = after_seq + limit if head[1] else min(int(head[0] or 0), after_seq + limit)
        if last <= after_seq:
            return []
        numbers = cast(
            list[bytes], self.redis.lrange(keys.prefix(run_id) + "order", after_seq, last - 1)
        )
        found = self.entries(run_id, [int(number) for number in numbers])
        return [entry for entry in found if entry is not None]

    def result(self, entry: Entry) -> bytes | None:
        """The result's bytes; None when it has none or its time to live is over."""
        if not entry.result_ref:
            return None
        if entry.result_ref == "inline":
            return cast(
                bytes | None, self.redis.get(f"{keys.prefix(entry.run_id)}r:{entry.number}")
            )
        return self.storage.read(entry.result_ref)

    def results(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """`result` of several entries, those in Redis in one round trip."""
        inline = [e for e in entries if e.result_ref == "inline"]
        names = [f"{keys.prefix(e.run_id)}r:{e.number}" for e in inline]
        found = dict(
            zip(
                names,
                cast(list[bytes | None], self.redis.mget(names)) if names else [],
                strict=True,
            )
        )
        return [
            found[f"{keys.prefix(e.run_id)}r:{e.number}"]
            if e.result_ref == "inline"
            else self.result(e)
            for e in entries
        ]

    def cancel(self, run_id: str, number: int) -> str:
        """Cancel an entry: "cancelled", "stopping" (a running sample), "already_running" or "finished"."""
        reply = self._call("cancel", run_id, number, json.dumps(SignalError("cancelled").to_dict()))
        return cast(bytes, reply[0]).decode()

    def close(self, run_id: str, status: str, error: SignalError | None = None) -> bool:
        """End the run; its open operations end with it. False when it had ended before."""
        ended = error or SignalError(
            "run_closed", f"The run was {status} before this operation finished."
        )
        entry_status = "cancelled" if status == "cancelled" else "failed"
        own = json.dumps(error.to_dict()) if error else ""
        return bool(
            self._call("close", run_id, status, own, entry_status, json.dumps(ended.to_dict()))[0]
            == b"ok"
        )

    # --- the agent ----------------------------------------------------------------------------

    def install_epoch(self, run_id: str, epoch: int, worker: str, device: dict[str, Any]) -> bool:
        """Let the worker of a new lease in and every earlier one out. False when the run has ended or
        a later lease is installed."""
        return bool(self._call("place", run_id, epoch, worker, json.dumps(device))[0] == b"ok")

    def sweep(self) -> int:
        """End what waited too long (lane gaps, deadlines); how many operations ended."""
        now, ended = time.time(), 0
        for member in cast(list[bytes], self.redis.zrangebyscore(keys.GAPS, "-inf", now, 0, 100)):
            run_id, lane = member.decode().split("|", 1)
            error = SignalError(
                "sequence_gap", f"An earlier client_seq of lane {lane!r} did not arrive in time."
            )
            ended += self._expire(run_id, "gap", lane, error)
        for member in cast(
            list[bytes], self.redis.zrangebyscore(keys.DEADLINES, "-inf", now, 0, 1000)
        ):
            run_id, number = member.decode().split("|", 1)
            ended += self._expire(run_id, "deadline", number, SignalError("deadline_exceeded"))
        return ended

    def retire(self, run_id: str) -> None:
        """Give everything of an ended run its time to live, in small steps."""
        base, ttl = keys.prefix(run_id), self.settings.result_ttl_s
        head = self.head(run_id)
        if head is None:
            return
        for first in range(1, head.entries + 1, 500):
            pipe = self.redis.pipeline(transaction=False)
            for number in range(first, min(first + 500, head.entries + 1)):
                pipe.expire(f"{base}e:{number}", ttl)
                pipe.expire(f"{base}b:{number}", ttl)
            pipe.execute()
        names = [base + name for name in ("order", "open", "idem", "head")]
        names += [
            key.decode()
            for key in self.redis.scan_iter(base.replace("{", "[{]") + "l*", count=1000)
        ]
        for name in names:
            self.redis.expire(name, ttl)

    def open_runs(self) -> list[str]:
        """Runs that have not ended."""
        return sorted(
            member.decode() for member in cast(set[bytes], self.redis.smembers(keys.RUNS))
        )

    # --- the worker ---------------------------------------------------------------------------

    def report_ready(self, run_id: str, epoch: int, device: dict[str, Any]) -> None:
        """The session is in memory. Raises Fenced or Closed."""
        self._fenced(self._call("report", run_id, epoch, json.dumps(device)))

    def take(self, run_id: str, epoch: int, *, listening: bool = False) -> Taken | None:
        """The next operation to execute, or None when none is eligible. Raises Fenced or Closed.

        `listening` keeps the bell taken: the worker will call `listen` and `take` again.
        """
        reply = self._fenced(self._call("take", run_id, epoch, "1" if listening else ""))
        if reply[0] == b"empty":
            return None
        ref = reply[4].decode()
        return Taken(
            run_id=run_id,
            number=int(reply[1]),
            seq=int(reply[2]),
            kind=reply[3].decode(),
            body=self.storage.read(ref) or b"" if ref else reply[5],
            submitted_at=float(reply[6]),
            started_at=float(reply[7]),
            tokens=int(reply[8]),
            doomed_by=int(reply[9]) if reply[9] else None,
        )

    def listen(self, run_id: str, seconds: float) -> bool:
        """Wait a moment for an operation to become eligible; a stale yes is possible and harmless."""
        return self.redis.blpop([keys.prefix(run_id) + "ring"], timeout=seconds) is not None

    def commit(self, run_id: str, epoch: int, taken: Taken, outcome: Outcome) -> None:
        """End an operation. Safe to repeat. Raises Fenced, Closed or Behind."""
        body, ref = self._store(run_id, outcome.result)
        reply = self._call(
            "commit", run_id, epoch, taken.number, taken.seq, outcome.status, body, ref,
            json.dumps(outcome.error) if outcome.error else "", json.dumps(outcome.data),
            json.dumps(outcome.state), self.settings.result_ttl_s, outcome.close_status,
        )  # fmt: skip
        self._fenced(reply)
        if reply[0] == b"behind":
            raise Behind(
                f"{run_id}: seq {taken.seq} was computed, the journal is at {int(reply[1])}"
            )

    def must_stop(self, run_id: str, epoch: int, number: int) -> bool:
        """Whether a running sample is to end at its next token."""
        row = cast(
            list[bytes | None],
            self.redis.hmget(keys.prefix(run_id) + "head", ["stop", "closed", "epoch"]),
        )
        stop, closed, current = row
        return stop == str(number).encode() or bool(closed) or current != str(epoch).encode()

    # --- inside -------------------------------------------------------------------------------

    def _store(self, run_id: str, data: bytes) -> tuple[bytes, str]:
        if len(data) <= self.settings.inline_bytes:
            return data, ""
        key = f"runs/{run_id}/bodies/{secrets.token_hex(12)}"
        self.storage.write(key, data)
        return b"", key

    def _expire(self, run_id: str, what: str, which: str, error: SignalError) -> int:
        reply = self._call("expire", run_id, what, which, json.dumps(error.to_dict()))
        return int(reply[1]) if reply[0] == b"ok" else 0

    def _call(self, name: str, run_id: str, *args: Any) -> list[Any]:
        return cast(list[Any], self._scripts[name](keys=[keys.prefix(run_id)], args=args))

    @staticmethod
    def _fenced(reply: list[Any]) -> list[Any]:
        if reply[0] == b"fenced":
            raise Fenced
        if reply[0] == b"closed":
            raise Closed
        return reply


def _appended(flat: Sequence[bytes]) -> list[Appended]:
    rows = [flat[i : i + 6] for i in range(0, len(flat), 6)]
    return [
        Appended(
            int(n),
            int(seq) if seq else None,
            status.decode(),
            replayed == b"1",
            float(at),
            int(applied),
        )
        for n, seq, status, replayed, at, applied in rows
    ]


def _pairs(flat: Sequence[bytes]) -> list[tuple[int, str]]:
    return [(int(flat[i]), flat[i + 1].decode()) for i in range(0, len(flat), 2)]


def _append_error(reply: list[Any], entries: Iterable[NewEntry]) -> SignalError:
    code = reply[0].decode()
    if code == "missing":
        return SignalError("not_found", "There is no such run, or its records have expired.")
    if code == "closed":
        return SignalError(
            "run_closed", f"The run is {reply[1].decode()} and takes no more operations."
        )
    if code == "queue_full":
        return SignalError(
            "queue_full", f"The run has {reply[1]} unfinished operations; wait for some to finish."
        )
    if code in ("client_seq_conflict", "sequence_gap"):
        entry = list(entries)[int(reply[1]) - 1]
        where = f"client_seq {entry.client_seq} of lane {entry.lane!r}"
        text = {
            "client_seq_conflict": "was sent before with another request",
            "sequence_gap": "came after its lane went on",
        }
        return SignalError(code, f"{where} {text[code]}.", param="client_seq")
    return SignalError(code)
