"""What a journal remembers: finished entries in Redis and, sealed, in storage, read as one.

A journal is sealed behind the second-newest snapshot: its entries move into segments and leave Redis, so
that what a run holds there is bounded. Readers see no difference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import cast

from schemas.errors import SignalError
from workers.queue import keys
from workers.queue.records import Entry, Head, Past
from workers.queue.scripts import Missing, Scripts
from workers.queue.segments import chunks

# A client's own names of this many operations stay known in each lane, however long ago they were sealed.
LANE_MEMORY = 10_000
_TRIM_STEP = 500
_PAGE = 200
# Entries that are being sealed may be seen neither here nor there at a look, but not at so many.
_LOOKS = 5


class History(Scripts):
    """The reading side of journals, and their sealing."""

    def head(self, run_id: str) -> Head | None:
        """The run as a whole; None when its journal is gone or was never made."""
        return self.heads([run_id])[0]

    def heads(self, run_ids: Sequence[str]) -> list[Head | None]:
        """`head` of several runs in one round trip."""
        # Both of a run at one moment: a trim changes the base and shortens the order.
        pipe = self.redis.pipeline(transaction=True)
        for run_id in run_ids:
            pipe.hgetall(keys.prefix(run_id) + "head")
            pipe.llen(keys.prefix(run_id) + "order")
            pipe.llen(keys.prefix(run_id) + "free")
            pipe.scard(keys.prefix(run_id) + "flying")
        rows = pipe.execute()
        return [
            Head.from_redis(run_id, *rows[4 * i : 4 * i + 4]) if rows[4 * i] else None
            for i, run_id in enumerate(run_ids)
        ]

    def entries(self, run_id: str, numbers: Sequence[int]) -> list[Entry | None]:
        """Entries by number, of those that are not sealed; None for one that is not here."""
        pipe = self.redis.pipeline(transaction=False)
        for number in numbers:
            pipe.hgetall(f"{keys.prefix(run_id)}e:{number}")
        rows = pipe.execute()
        return [
            Entry.from_redis(run_id, n, row) if row else None
            for n, row in zip(numbers, rows, strict=True)
        ]

    def sealed(self, run_id: str, number: int, tag: str) -> Entry | None:
        """An entry that is sealed in storage; None when there is none of this number and tag."""
        found = self.segments.find(run_id, number, tag)
        return None if found is None else found.entry(run_id)

    def finished_after(self, run_id: str, after_seq: int, limit: int) -> list[Entry]:
        """Finished entries with a seq above `after_seq`, in order, at most `limit`.

        Those that are kept nowhere any more are passed over.
        """
        found: list[Entry] = []
        after, looks = after_seq, 0
        while (head := self.head(run_id)) is not None:
            # A run that has ended has no unfinished operation, whatever was applied.
            known = head.seq_count if head.closed else head.applied
            last = min(after_seq + limit, known)
            if after >= last or looks == _LOOKS:
                break
            page = self._entries_of(head, after, last)
            found += page
            after += len(page)
            looks = 0 if page else looks + 1
            if looks == _LOOKS and after < head.base:
                after, looks = head.base, 0
        return found

    def _entries_of(self, head: Head, after: int, last: int) -> list[Entry]:
        """Entries of the seqs behind `after` without a gap, some of those up to `last`."""
        if after < head.base:
            sealed = self.segments.between(head.run_id, after, min(last, head.base))
            return [past.entry(head.run_id) for past in sealed]
        first, end = after - head.base, last - 1 - head.base
        numbers = self.redis.lrange(keys.prefix(head.run_id) + "order", first, end)
        rows = self.entries(head.run_id, [int(number) for number in cast(list[bytes], numbers)])
        # What was sealed since the look at the head is not here, or is in another place.
        whole = takewhile(
            lambda it: it[1] is not None and it[1].seq == it[0], enumerate(rows, after + 1)
        )
        return [entry for _, entry in whole if entry is not None]

    def result(self, entry: Entry) -> bytes | None:
        """The result's bytes; None when it has none or its time to live is over."""
        return self.results([entry])[0]

    def results(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """`result` of several entries, those in Redis in one round trip."""
        oldest = time.time() - self.settings.result_ttl_s
        kept = [entry for entry in entries if (entry.finished_at or 0.0) >= oldest]
        names = [_result_key(entry) for entry in kept if entry.result_ref == "inline"]
        values = cast(list[bytes | None], self.redis.mget(names)) if names else []
        inline = dict(zip(names, values, strict=True))
        return [self._result(entry, inline) if entry in kept else None for entry in entries]

    def _result(self, entry: Entry, inline: dict[str, bytes | None]) -> bytes | None:
        if entry.result_ref == "":
            return None
        if entry.result_ref != "inline":
            return self.storage.read(entry.result_ref)
        found = inline[_result_key(entry)]
        if found is None:
            sealed = self.segments.find(entry.run_id, entry.number, entry.tag)
            found = sealed.result if sealed is not None else None
        return found

    def past(self, run_id: str, after: int, upto: int) -> Iterator[Past]:
        """Finished entries with after < seq <= upto, in order, from storage and Redis.

        Raises SignalError history_gone when one of them is kept nowhere any more.
        """
        wanted, looks = after + 1, 0
        while wanted <= upto:
            page = self._page(run_id, wanted, upto)
            yield from page
            wanted += len(page)
            # Nothing at one look may only mean that it was sealed right then.
            looks = 0 if page else looks + 1
            if looks == _LOOKS:
                raise SignalError(
                    "history_gone", f"The run's operation at seq {wanted} is not kept any more."
                )

    def _page(self, run_id: str, first: int, upto: int) -> list[Past]:
        """Entries of the seqs from `first` on without a gap, some of those up to `upto`."""
        head = self.head(run_id)
        sealed_upto = upto if head is None else min(upto, head.base)
        if first <= sealed_upto:
            return list(islice(self.segments.between(run_id, first - 1, sealed_upto), _PAGE))
        if head is None:
            return []
        last = min(upto, head.seq_count, first + _PAGE - 1)
        return self._unsealed(run_id, head.base, first, last) if last >= first else []

    def _unsealed(self, run_id: str, base: int, first: int, last: int) -> list[Past]:
        """What lies in Redis, from `first` on without a gap, if `base` is still the base."""
        prefix = keys.prefix(run_id)
        numbers = cast(
            list[bytes],
            self.redis.lrange(prefix + "order", first - 1 - base, last - 1 - base),
        )
        # At one moment: an entry must not be sealed between its fields and its body.
        pipe = self.redis.pipeline(transaction=True)
        for number in numbers:
            pipe.hgetall(f"{prefix}e:{int(number)}")
            pipe.get(f"{prefix}b:{int(number)}")
            pipe.get(f"{prefix}r:{int(number)}")
        rows = pipe.execute()
        found: list[Past] = []
        for i, number in enumerate(numbers):
            fields, body, result = rows[3 * i : 3 * i + 3]
            if not fields or int(fields[b"seq"]) != first + i:
                break
            found.append(_past(int(number), fields, body or b"", result or b""))
        return found

    def seal(self, run_id: str, epoch: int | None, upto: int) -> int:
        """Move the journal up to a seq into storage; the seq up to which it is sealed now.

        `epoch` is the worker's, None once the run has ended. Raises Fenced, Missing, SignalError
        storage_full, or OSError; what was sealed before that stays sealed.
        """
        head = self.head(run_id)
        if head is None:
            raise Missing
        base, upto = head.base, min(upto, head.seq_count if head.closed else head.applied)
        while base < upto:
            page = self._unsealed(run_id, base, base + 1, min(upto, base + _TRIM_STEP))
            if not page:
                break
            for part in chunks(page):
                self.segments.write(run_id, part)
            reply = self._fenced(
                self._call(
                    "trim",
                    run_id,
                    "" if epoch is None else epoch,
                    page[-1].seq,
                    _TRIM_STEP,
                    LANE_MEMORY,
                )
            )
            if int(reply[1]) <= base:
                break
            base = int(reply[1])
        return base

    def body(self, ref: str, inline: bytes) -> bytes:
        """An operation's body. Raises OSError when storage does not have it."""
        if not ref:
            return inline
        found = self.storage.read(ref)
        if found is None:
            raise OSError(f"the body {ref} is not in storage")
        return found


def _result_key(entry: Entry) -> str:
    return f"{keys.prefix(entry.run_id)}r:{entry.number}"


def _past(number: int, row: dict[bytes, bytes], body: bytes, result: bytes) -> Past:
    text = {name.decode(): value.decode() for name, value in row.items()}
    ref = text.get("res", "")
    return Past(
        seq=int(text["seq"]),
        number=number,
        tag=text["tag"],
        kind=text["kind"],
        status=text["status"],
        submitted_at=float(text["sub"]),
        started_at=float(text["start"]) if "start" in text else None,
        finished_at=float(text["fin"]) if "fin" in text else 0.0,
        tokens=int(text["tok"]),
        lane=text["lane"],
        client_seq=int(text["cseq"]) if text["cseq"] else None,
        digest=text["digest"],
        body=body,
        body_ref=text["body"],
        result=result,
        result_ref="" if ref == "inline" else ref,
        error=json.loads(text["err"]) if text.get("err") else None,
        record=json.loads(text["rec"]) if text.get("rec") else {},
    )
