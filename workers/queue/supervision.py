"""What the agent, and an owner who pauses or moves a run, do to a journal: epochs, deaths, holds, the end."""

from __future__ import annotations

import json
import time
from typing import Any, cast

from schemas.errors import SignalError
from workers.queue import keys
from workers.queue.history import History

# How often an operation may bring its worker down before it is given up.
MAX_CRASHES = 3


class Supervision(History):
    """The supervising side of journals."""

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

    def lost_worker(self, run_id: str, epoch: int, why: str, *, blame: bool) -> str:
        """The worker of `epoch` is gone; with `blame`, by what the running operation did.

        An operation that is blamed three times ends in operation_crashed_worker. Answers "ok", "stale"
        (another epoch is installed), "closed" or "missing".
        """
        error = json.dumps(SignalError("operation_crashed_worker").to_dict())
        reply = self._call("lost", run_id, epoch, why, "1" if blame else "", MAX_CRASHES, error)
        return cast(bytes, reply[0]).decode()

    def hold(self, run_id: str, hold: str, info: dict[str, Any]) -> bool:
        """Hold a run; False when it has ended, is gone, or is held for another reason."""
        return bool(self._call("hold", run_id, hold, json.dumps(info))[0] == b"ok")

    def release(self, run_id: str, hold: str) -> bool:
        """Let a run go on that is held so; False when it is not."""
        return bool(self._call("release", run_id, hold)[0] == b"ok")

    def move(self, run_id: str, slot: str) -> bool:
        """Ask that the run leave `slot` ("host/slot"); "" takes the wish back. False when it has ended."""
        return bool(self._call("move", run_id, slot)[0] == b"ok")

    def detached(self, run_id: str, epoch: int) -> None:
        """The worker of `epoch` has let go of the living run: it is paused, or moves."""
        self._call("detached", run_id, epoch)

    def note(self, run_id: str, kind: str, data: dict[str, Any]) -> None:
        """An event of the run, for the stream that the projector reads."""
        row: dict[Any, Any] = {
            "type": kind,
            "run": run_id,
            "at": f"{time.time():.6f}",
            "data": json.dumps(data),
        }
        self.redis.xadd(keys.COMMITS, row)

    def reopen(
        self,
        run_id: str,
        owner: str,
        *,
        applied: int,
        entries: int,
        epoch: int = 0,
        worker: str = "",
        base: int | None = None,
        at_seq: int | None = None,
    ) -> bool:
        """Make a lost journal anew at `applied`, held as rolled back; False when there is one.

        `epoch` and `worker` are those of a worker that lives; `base` is where its own records begin, and
        `at_seq` to which seq it will put them back.
        """
        reply = self._call(
            "reopen", run_id, owner, self.settings.result_ttl_s, epoch, worker, applied,
            applied if base is None else base, entries, applied if at_seq is None else at_seq,
        )  # fmt: skip
        return bool(reply[0] == b"ok")

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

    def retire(self, run_id: str) -> None:
        """Seal what is left of an ended run, and give the rest its time to live, in small steps."""
        base, ttl = keys.prefix(run_id), self.settings.result_ttl_s
        head = self.head(run_id)
        if head is None:
            return
        try:
            self.seal(run_id, None, head.seq_count)
        except (SignalError, OSError):
            # The disk is full or away: the entries stay for their time where they are.
            for first in range(1, head.entries + 1, 500):
                pipe = self.redis.pipeline(transaction=False)
                for number in range(first, min(first + 500, head.entries + 1)):
                    for kind in "ebr":
                        pipe.expire(f"{base}{kind}:{number}", ttl)
                pipe.execute()
        for name in self._names(run_id):
            self.redis.expire(name, ttl)

    def _names(self, run_id: str) -> list[str]:
        """What a run has in Redis besides its entries, and idempotency keys, which expire by themselves."""
        base = keys.prefix(run_id)
        lanes = self.redis.scan_iter(base.replace("{", "[{]") + "l*", count=1000)
        own = ("order", "open", "head", "ring", "refs")
        return [base + name for name in own] + [key.decode() for key in lanes]

    def erase(self, run_id: str) -> None:
        """Delete everything of a run from Redis."""
        pattern = keys.prefix(run_id).replace("{", "[{]") + "*"
        batch: list[bytes] = []
        for key in self.redis.scan_iter(pattern, count=1000):
            batch.append(key)
            if len(batch) >= 500:
                self.redis.delete(*batch)
                batch = []
        if batch:
            self.redis.delete(*batch)
        self.redis.srem(keys.RUNS, run_id)

    def open_runs(self) -> list[str]:
        """Runs that have not ended."""
        return sorted(
            member.decode() for member in cast(set[bytes], self.redis.smembers(keys.RUNS))
        )

    def _expire(self, run_id: str, what: str, which: str, error: SignalError) -> int:
        reply = self._call("expire", run_id, what, which, json.dumps(error.to_dict()))
        return int(reply[1]) if reply[0] == b"ok" else 0
