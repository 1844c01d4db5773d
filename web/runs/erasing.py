"""Deleting a run: from Redis, storage, SQL, and the files below them.

The order lets a deletion that was cut off be asked for again: the row of the run goes last. What was
deleted can still be in the pages of a file; that is noted in the same transaction and scrubbed away at
once, or by the projector when it must be tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from redis import Redis

from gpu_pool import of_run
from schemas.errors import SignalError
from web.artifacts import service as artifacts
from web.context import services
from web.db.scrub import scrub
from web.db.tables import ErasureRow
from web.events import service as events
from web.idempotency import service as idempotency
from web.metrics import service as metrics
from web.runs import service
from web.runs.access import runs
from web.runs.facts import erased
from web.tinker import forgetting as tinker
from workers.queue import keys

PATIENCE_S = 15.0
# A run that has begun from this one needs so long at most, unless it waits for a device.
READERS_S = 3.0
_LOOK_AGAIN_S = 0.05
_PAGE = 1000


def erase_run(run_id: str) -> None:
    """Delete a run whose ownership was checked; cancels it first when it is open.

    Raises SignalError: run_in_use while another run still reads its state, unavailable while its worker
    has not let go of it (what was begun is then gone on with by the next request).
    """
    s = services()
    if not _within(READERS_S, lambda: not _readers(run_id)):
        raise SignalError("run_in_use")
    s.journal.close(run_id, "cancelled")
    runs().note_closed(run_id, "cancelled", None)
    if not _within(PATIENCE_S, lambda: not _held(run_id)):
        raise SignalError("unavailable", "The run's worker has not let go of it yet; try again.")
    s.journal.erase(run_id)
    _erase_traces(s.redis, run_id)
    s.forget_queue(run_id)
    s.storage.delete(f"runs/{run_id}")
    _erase_rows(run_id)
    s.redis.publish(keys.DONE, erased(run_id))
    s.facts.heard(erased(run_id))
    scrub(s.db, s.redis)


def _readers(run_id: str) -> list[str]:
    """Runs that began from this one and have no snapshot of their own yet."""
    children = runs().children(run_id)
    heads = services().journal.heads(children) if children else []
    return [
        child
        for child, head in zip(children, heads, strict=True)
        if head is None or not (head.closed or head.snapshot)
    ]


def _held(run_id: str) -> bool:
    with services().db.reading() as session:
        return of_run.is_leased(session, run_id)


def _within(seconds: float, so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not so():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def _erase_traces(redis: Redis, run_id: str) -> None:
    """What names the run in keys that all runs share."""
    for key in (keys.GAPS, keys.DEADLINES):
        for member, _ in redis.zscan_iter(key, match=f"{run_id}|*", count=_PAGE):
            redis.zrem(key, member)
    begin = b"-"
    while rows := cast(
        list[tuple[bytes, dict[bytes, bytes]]], redis.xrange(keys.COMMITS, begin, count=_PAGE)
    ):
        mine = [place for place, fields in rows if fields.get(b"run") == run_id.encode()]
        if mine:
            redis.xdel(keys.COMMITS, *mine)
        begin = b"(" + rows[-1][0]


def _erase_rows(run_id: str) -> None:
    with services().db.writing() as session:
        tinker.forget(session, run_id)
        metrics.forget(session, run_id)
        artifacts.forget(session, run_id)
        events.forget(session, run_id)
        idempotency.forget(session, run_id)
        of_run.forget(session, run_id)
        service.forget(session, run_id)
        session.add(ErasureRow())
