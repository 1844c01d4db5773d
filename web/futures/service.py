"""Waiting for entries of journals and reading them. No Flask.

One pattern throughout: register with the hub first, then look at the journal, then wait. What finishes
between two of these steps is never missed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

from schemas.errors import SignalError
from web.futures.render import applied_of, future_bytes
from workers.queue.futures import FutureHub, parse_future_id
from workers.queue.journal import Journal
from workers.queue.records import Entry
from workers.settings import Settings

# Several runs share no event: between looks at them all, this long.
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class FutureRef:
    """A future id, taken apart."""

    run_id: str
    entry: int
    tag: str


class Futures:
    """The futures of a server."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        hub: FutureHub,
        is_open: Callable[[str], bool],
    ) -> None:
        """Touches the journal and the hub; `is_open(run_id)` is SQL's word on a run whose journal is gone."""
        self.settings, self.journal, self.hub = settings, journal, hub
        self._is_open = is_open

    def parse(self, text: str) -> FutureRef:
        """Raises SignalError not_found for what this server never gave out."""
        return FutureRef(*parse_future_id(self.settings, text))

    def entry(self, ref: FutureRef) -> Entry:
        """The entry behind a future. Raises SignalError future_expired or unavailable."""
        return self.entries([ref])[0]

    def entries(self, refs: Sequence[FutureRef]) -> list[Entry]:
        """The entries behind futures, in their order. Raises SignalError future_expired or unavailable."""
        found: dict[FutureRef, Entry | None] = {}
        for run_id in dict.fromkeys(ref.run_id for ref in refs):
            mine = [ref for ref in refs if ref.run_id == run_id]
            numbers = [ref.entry for ref in mine]
            found.update(zip(mine, self.journal.entries(run_id, numbers), strict=True))
        return [self._judged(ref, found[ref]) for ref in refs]

    def _judged(self, ref: FutureRef, entry: Entry | None) -> Entry:
        """The entry that this server meant when it gave the future's id out."""
        if entry is not None and entry.tag == ref.tag:
            return entry
        sealed = self.journal.sealed(ref.run_id, ref.entry, ref.tag)
        if sealed is not None:
            return sealed
        head = self.journal.head(ref.run_id)
        if head is None and self._is_open(ref.run_id):
            raise SignalError("unavailable", "The run's journal is being rebuilt.", retry_after_s=1)
        if head is not None and (head.rolled or entry is not None):
            return lost_entry(ref)
        raise SignalError("future_expired")

    def wait(
        self,
        ref: FutureRef,
        seconds: float,
        place: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Entry:
        """The entry once it has ended, or as it is when the time is over.

        `place` is entered only when it has not ended yet, and may refuse the wait.
        """
        with self.hub.watch(ref.run_id, [ref.entry]) as event:
            entry = self.entry(ref)
            if entry.finished:
                return entry
            deadline = time.monotonic() + seconds
            with place():
                while not entry.finished and (left := deadline - time.monotonic()) > 0:
                    event.wait(left)
                    event.clear()
                    entry = self.entry(ref)
        return entry

    def wait_all(self, refs: Sequence[FutureRef], seconds: float) -> list[Entry]:
        """All entries once they have ended, or as they are when the time is over."""
        deadline = time.monotonic() + seconds
        entries = self.entries(refs)
        while open_refs := _unfinished(refs, entries):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # A run's operations end in order, so its last one is worth waiting for.
            self.wait(max(open_refs, key=lambda ref: (ref.run_id, ref.entry)), left)
            entries = self.entries(refs)
        return entries

    def wait_any(self, refs: Sequence[FutureRef], seconds: float) -> list[Entry]:
        """All entries once one of them has ended, or as they are when the time is over."""
        runs = list(dict.fromkeys(ref.run_id for ref in refs))
        deadline = time.monotonic() + seconds
        with ExitStack() as stack:
            events = [
                stack.enter_context(
                    self.hub.watch(run, [ref.entry for ref in refs if ref.run_id == run])
                )
                for run in runs
            ]
            entries = self.entries(refs)
            while not any(entry.finished for entry in entries):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                events[0].wait(left if len(events) == 1 else min(left, _LOOK_AGAIN_S))
                events[0].clear()
                entries = self.entries(refs)
        return entries

    def wait_run(self, run_id: str, seconds: float, look: Callable[[], list[Entry]]) -> list[Entry]:
        """What `look` finds in a run's journal: at once, or as soon as it finds anything.

        Empty when the time is over, and when nothing can come any more because the run has ended.
        """
        with self.hub.watch(run_id) as event:
            deadline = time.monotonic() + seconds
            found = look()
            while not found and not self._ended(run_id):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                event.wait(left)
                event.clear()
                found = look()
        return found or look()

    def _ended(self, run_id: str) -> bool:
        head = self.journal.head(run_id)
        return head is None or bool(head.closed)

    def render_one(self, ref: FutureRef, entry: Entry) -> bytes:
        """The wire form of one entry. Raises SignalError future_expired when its result is gone."""
        head = self.journal.head(ref.run_id) if entry.status == "pending" else None
        position = self.journal.positions([entry]).get((entry.run_id, entry.number))
        result = self.journal.result(entry)
        if entry.status == "completed" and result is None:
            raise SignalError("future_expired")
        return future_bytes(self.settings, entry, applied_of(head), result, position)

    def render(self, refs: Sequence[FutureRef], entries: Sequence[Entry]) -> list[bytes]:
        """The wire forms of entries that were read."""
        pending = {entry.run_id for entry in entries if entry.status == "pending"}
        runs = sorted(pending)
        heads = dict(zip(runs, self.journal.heads(runs), strict=True)) if runs else {}
        results, places = self.journal.results(entries), self.journal.positions(entries)
        return [
            future_bytes(
                self.settings,
                entry,
                applied_of(heads.get(entry.run_id)),
                result,
                places.get((entry.run_id, entry.number)),
            )
            for entry, result in zip(entries, results, strict=True)
        ]


def lost_entry(ref: FutureRef) -> Entry:
    """What is left of an operation whose record the server lost: that it did not take effect."""
    return Entry(
        run_id=ref.run_id,
        number=ref.entry,
        seq=None,
        kind="lost",
        status="failed",
        lane=None,
        client_seq=None,
        submitted_at=0.0,
        started_at=None,
        finished_at=None,
        tokens=0,
        error=SignalError("journal_lost").to_dict(),
        result_ref="",
        digest="",
        tag=ref.tag,
    )


def _unfinished(refs: Sequence[FutureRef], entries: Sequence[Entry]) -> list[FutureRef]:
    return [ref for ref, entry in zip(refs, entries, strict=True) if not entry.finished]
