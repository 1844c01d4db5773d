"""Segments: finished entries of a journal, sealed in storage so that Redis need not keep them.

One file per range of seqs: a sha256 of 32 bytes, then compressed msgpack. Its name tells the range and the
entry numbers in it, so that a listing finds what is wanted. Touches storage only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from schemas.errors import SignalError
from workers.queue.records import Past
from workers.storage import Storage

FORMAT = 1
MAX_BYTES = 8 * 1024 * 1024
_NAME = re.compile(r"(\d{12})-(\d{12})-(\d{12})-(\d{12})\.seg\Z")
_KEPT_OPEN = 8


@dataclass(frozen=True)
class Segment:
    """A sealed range: its first and last seq, and the lowest and highest entry number in it."""

    key: str
    first: int
    last: int
    lowest: int
    highest: int
    size: int
    modified_at: float


def folder(run_id: str) -> str:
    """Where a run's segments live."""
    return f"runs/{run_id}/journal"


class Segments:
    """The sealed history of runs. Safe to use from several threads."""

    def __init__(self, storage: Storage) -> None:
        """Reads and writes `storage`; keeps the last few segments that were read."""
        self._storage = storage
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[Past]] = OrderedDict()

    def write(self, run_id: str, entries: Sequence[Past]) -> Segment:
        """Seal entries of consecutive seqs, and read them back. Raises SignalError storage_full."""
        numbers = [entry.number for entry in entries]
        first, last = entries[0].seq, entries[-1].seq
        name = f"{first:012d}-{last:012d}-{min(numbers):012d}-{max(numbers):012d}.seg"
        key, data = f"{folder(run_id)}/{name}", _encode(run_id, entries)
        self._storage.write(key, data)
        if self._storage.read(key) != data:
            raise OSError(f"{key} is not what was written")
        return Segment(key, first, last, min(numbers), max(numbers), len(data), 0.0)

    def all(self, run_id: str) -> list[Segment]:
        """The segments of a run, in order."""
        found = []
        for info in self._storage.list(folder(run_id)):
            if match := _NAME.search(info.key):
                first, last, lowest, highest = map(int, match.groups())
                found.append(
                    Segment(info.key, first, last, lowest, highest, info.size, info.modified_at)
                )
        return found

    def read(self, segment: Segment) -> list[Past]:
        """Its entries in order. Raises SignalError snapshot_damaged that names the file."""
        with self._lock:
            found = self._open.get(segment.key)
            if found is not None:
                self._open.move_to_end(segment.key)
                return found
        found = _decode(segment.key, self._storage.read(segment.key))
        with self._lock:
            self._open[segment.key] = found
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
        return found

    def between(self, run_id: str, after: int, upto: int) -> Iterator[Past]:
        """Sealed entries with after < seq <= upto, in order, without gaps as long as they are sealed."""
        wanted = after + 1
        for segment in self.all(run_id):
            # A seal that was begun twice may have left segments that overlap.
            if segment.last < wanted or segment.first > upto:
                continue
            for entry in self.read(segment):
                if entry.seq == wanted <= upto:
                    yield entry
                    wanted += 1

    def find(self, run_id: str, number: int, tag: str) -> Past | None:
        """A sealed entry by its number and tag."""
        for segment in reversed(self.all(run_id)):
            if segment.lowest <= number <= segment.highest:
                for entry in self.read(segment):
                    if (entry.number, entry.tag) == (number, tag):
                        return entry
        return None

    def prune(self, run_id: str, keep_after: int, older_than: float) -> None:
        """Delete segments that end at or before a seq and were written before a time (epoch seconds),
        with the bodies and results that they alone name."""
        for segment in self.all(run_id):
            if segment.last > keep_after or segment.modified_at >= older_than:
                return
            for entry in self.read(segment):
                for ref in filter(None, (entry.body_ref, entry.result_ref)):
                    self._storage.delete(ref)
            self._storage.delete(segment.key)


def chunks(entries: Sequence[Past]) -> Iterator[Sequence[Past]]:
    """Consecutive parts, each of about `MAX_BYTES` at most."""
    begin, size = 0, 0
    for index, entry in enumerate(entries):
        own = len(entry.body) + len(entry.result) + 400
        if index > begin and size + own > MAX_BYTES:
            yield entries[begin:index]
            begin, size = index, 0
        size += own
    if entries[begin:]:
        yield entries[begin:]


def _encode(run_id: str, entries: Sequence[Past]) -> bytes:
    rows = [dataclasses.asdict(entry) for entry in entries]
    packed = msgpack.packb({"format": FORMAT, "run_id": run_id, "entries": rows})
    data = zlib.compress(packed, 1)
    return hashlib.sha256(data).digest() + data


def _decode(key: str, raw: bytes | None) -> list[Past]:
    if raw is None or hashlib.sha256(raw[32:]).digest() != raw[:32]:
        what = "is not there" if raw is None else "does not have its sha256"
        raise SignalError("snapshot_damaged", f"The journal's segment {key} {what}.")
    content: dict[str, Any] = msgpack.unpackb(zlib.decompress(raw[32:]))
    return [Past(**row) for row in content["entries"]]
