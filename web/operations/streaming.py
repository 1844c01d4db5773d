"""A sample whose tokens come as Server-Sent Events while it runs.

An operation like any other: its future, its result and its order are those of `sample`. A client that hangs
up cancels it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from flask import Response

from schemas.errors import SignalError
from web.answers import encode, event_stream
from web.context import Services, services
from web.futures.render import future_bytes
from web.futures.service import FutureRef, Futures
from web.middleware import request_id
from web.operations.answering import append, as_appended, futures
from web.runs.facts import RunFacts
from workers.queue import tokens
from workers.queue.records import Entry, NewEntry

# A client that has gone is only noticed by writing to it.
_BEAT_MS = 1_000
LONGEST_S = 900.0


@dataclass
class Watched:
    """A sample that is being watched."""

    services: Services
    futures: Futures
    ref: FutureRef
    entry: Entry
    request_id: str
    # Whether the sample is to go on without this stream.
    left: bool = False

    def look(self) -> Entry:
        """The entry as it is now."""
        self.entry = self.futures.entry(self.ref)
        return self.entry

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if not self.entry.finished and not self.left:
            self.services.journal.cancel(self.ref.run_id, self.ref.entry)


def stream(facts: RunFacts, entry: NewEntry) -> Response:
    """Append the sample and answer with its stream. Raises what `append` raises, and too_many_waits."""
    place = ExitStack()
    place.enter_context(services().long_poll())
    try:
        appended, headers = append(facts, [entry])
    except BaseException:
        place.close()
        raise
    ref = FutureRef(facts.run_id, appended[0].entry, appended[0].tag)
    first = as_appended(facts, entry, appended[0])
    watched = Watched(services(), futures(), ref, first, request_id())
    return event_stream(_lines(watched), place, headers)


def _lines(watched: Watched) -> Iterator[bytes]:
    try:
        yield _line("future", _future(watched))
        yield from _tokens(watched, time.monotonic() + LONGEST_S)
        yield _last(watched)
    finally:
        watched.cancel()


def _tokens(watched: Watched, until: float) -> Iterator[bytes]:
    """Until the sample has ended and everything that was written of it has been read."""
    redis, ref, place, begun = watched.services.waiting_redis, watched.ref, "0", False
    while True:
        ended = watched.entry.finished
        place, rows = tokens.read(redis, ref.run_id, ref.entry, place, 1 if ended else _BEAT_MS)
        for row in rows:
            if not isinstance(row, str):
                yield from (_line("token", encode(token)) for token in row)
            elif begun and row == tokens.BEGIN:
                yield _line("restart", b"{}")
            begun = True
        if not rows:
            if ended or time.monotonic() >= until:
                return
            yield b": still here\n\n"
        if not ended:
            watched.look()


def _last(watched: Watched) -> bytes:
    entry = watched.look()
    if not entry.finished:
        watched.left = True
        return _line("future", _future(watched))
    if entry.status != "completed":
        return _error(watched, SignalError.from_dict(entry.error or {}))
    result = watched.services.journal.result(entry)
    if result is None:
        return _error(watched, SignalError("future_expired"))
    return _line("result", result)


def _error(watched: Watched, error: SignalError) -> bytes:
    body = {"error": {**error.to_dict(), "request_id": watched.request_id}}
    return _line("error", encode(body))


def _future(watched: Watched) -> bytes:
    return future_bytes(watched.services.settings, watched.entry, 0, None)


def _line(event: str, data: bytes) -> bytes:
    # JSON has no line feed of its own.
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"
