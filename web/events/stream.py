"""Events as a stream of Server-Sent Events. Knows no request: what it needs is handed in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from web.events.service import HAPPENED, Page, event_body
from web.events.tables import RunEventRow
from workers.queue.futures import FutureHub

# Proxies close what is silent, and a client that has gone is only noticed by writing to it.
HEARTBEAT_S = 10.0
# A client comes again with the last id that it has; until then it holds a thread.
LONGEST_S = 300.0
AGAIN_MS = 1_000
# A run whose last event does not come wakes nobody.
_LOOK_AGAIN_S = 5.0


def stream(
    hub: FutureHub,
    run_id: str,
    after: int,
    look: Callable[[int], Page | None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[bytes]:
    """Events after `after`, those to come too, until the run has ended or the time is over.

    `look(after)` reads a page; None when the run has been deleted.
    """
    yield f"retry: {AGAIN_MS}\n\n".encode()
    end = clock() + LONGEST_S
    beat = clock() + HEARTBEAT_S
    with hub.watch(run_id, [HAPPENED]) as event:
        while (page := look(after)) is not None:
            for row in page.events:
                after = row.id
                yield line_of(row)
            if page.ended or clock() >= end:
                return
            if page.more:
                continue
            if clock() >= beat:
                beat = clock() + HEARTBEAT_S
                yield b": still here\n\n"
            event.wait(max(0.0, min(end - clock(), beat - clock(), _LOOK_AGAIN_S)))
            event.clear()


def line_of(row: RunEventRow) -> bytes:
    """One event as it goes over the wire; JSON has no line feed of its own."""
    body = json.dumps(event_body(row), allow_nan=False, separators=(",", ":"))
    return f"id: {row.id}\nevent: {row.type}\ndata: {body}\n\n".encode()
