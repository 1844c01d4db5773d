"""Operations that have no place in a run's order: samples from weights that no operation of the run changes.

They wait in a list of their own, may be executed beside anything, and end one by one. What a lost worker was
executing is executed again by the next; a commit is fenced like any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import cast

from workers.queue import keys
from workers.queue.records import Entry, Outcome, Taken
from workers.queue.supervision import Supervision

_FIELDS = 13


class Unordered(Supervision):
    """A worker's side of them, and what is to be seen of them while they wait."""

    def take_free(self, run_id: str, epoch: int, limit: int) -> list[Taken]:
        """Up to `limit` of the oldest, to be executed now. Raises Fenced, Closed, Held or Missing."""
        reply = self._fenced(self._call("take_free", run_id, epoch, limit))[1:]
        rows = [reply[at : at + _FIELDS] for at in range(0, len(reply), _FIELDS)]
        return [self._taken(run_id, row) for row in rows]

    def count_free(self, run_ids: Sequence[str]) -> list[int]:
        """How many wait in each of these runs."""
        pipe = self.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.llen(keys.prefix(run_id) + "free")
        return [int(count) for count in pipe.execute()]

    def _taken(self, run_id: str, row: Sequence[bytes]) -> Taken:
        """From what `begin` of the scripts gives."""
        ref = row[3].decode()
        return Taken(
            run_id=run_id,
            number=int(row[0]),
            seq=int(row[1]),
            kind=row[2].decode(),
            body=self.body(ref, row[4]),
            body_ref=ref,
            submitted_at=float(row[5]),
            started_at=float(row[6]),
            tokens=int(row[7]),
            doomed_by=int(row[8]) if row[8] else None,
            tag=row[9].decode(),
            lane=row[10].decode(),
            client_seq=int(row[11]) if row[11] else None,
            digest=row[12].decode(),
        )

    def commit_free(
        self, run_id: str, epoch: int, taken: Taken, outcome: Outcome, stored: tuple[bytes, str]
    ) -> None:
        """End one; `stored` is its result by `store_result`. Safe to repeat.

        Raises Fenced, Closed or Missing.
        """
        self._fenced(
            self._call(
                "commit_free", run_id, epoch, taken.number, taken.tag, outcome.status, *stored,
                json.dumps(outcome.error) if outcome.error else "",
            )
        )  # fmt: skip

    def positions(self, entries: Sequence[Entry]) -> dict[tuple[str, int], int]:
        """How many wait before each of those that wait, by run and number."""
        waiting = [entry for entry in entries if entry.status == "pending" and entry.free]
        if not waiting:
            return {}
        pipe = self.redis.pipeline(transaction=False)
        for entry in waiting:
            pipe.lpos(keys.prefix(entry.run_id) + "free", str(entry.number))
        found = zip(waiting, pipe.execute(), strict=True)
        return {(entry.run_id, entry.number): int(place or 0) for entry, place in found}

    def prune_free(self, run_id: str) -> None:
        """Delete what expired ones have left in storage. Raises OSError while storage is away."""
        name = keys.prefix(run_id) + "refs"
        for ref in cast(list[bytes], self.redis.zrangebyscore(name, "-inf", time.time(), 0, 500)):
            self.storage.delete(ref.decode())
            self.redis.zrem(name, ref)

    def stops(self, run_id: str, epoch: int, numbers: Sequence[int]) -> set[int]:
        """Which of the running samples are to end at their next token."""
        base = keys.prefix(run_id)
        pipe = self.redis.pipeline(transaction=False)
        pipe.hmget(base + "head", ["closed", "epoch"])
        for number in numbers:
            pipe.hget(f"{base}e:{number}", "stop")
        (closed, current), *stops = pipe.execute()
        if closed or current != str(epoch).encode():
            return set(numbers)
        return {number for number, stop in zip(numbers, stops, strict=True) if stop}
