"""The projector: reads the stream of commits and writes runs, events, metrics and artifacts into SQL.

A process of its own (`python -P -m web.projector`), elected by a lock in Redis, so that more than one
may be started. Each batch and the position in the stream are one SQL transaction, and every write is
idempotent by (run, seq) or by the entry of the stream: whatever dies when, the next one goes on where
SQL says. Who waits for a run's events is woken when they are in SQL.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gpu_pool import leases
from gpu_pool.database import Database
from web.artifacts import service as artifacts
from web.db.scrub import scrub
from web.db.tables import ProjectionRow
from web.events import service as run_events
from web.idempotency.service import IdempotencyKeys
from web.metrics import service as metrics
from web.runs.changes import happened, shown
from web.runs.service import close_row
from web.runs.tables import RunRow
from web.tinker.sweeping import sweep
from workers.queue import keys
from workers.queue.journal import Journal, connect
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger(__name__)

LOCK = "sig:projector"
LOCK_MS = 10_000
BATCH = 500
BLOCK_MS = 1_000
# A transaction per commit would cost more than a small operation: what comes within this time of the
# first is written together.
GATHER_S = 0.1
TIDY_S = 600.0
SWEEP_S = 10.0
_NAME = "commits"

# Takes the lock, or keeps it: only its holder may lengthen it.
_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder == false or holder == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return 0
"""


@dataclass(frozen=True)
class Event:
    """One entry of the stream of commits; `id` is its place there."""

    id: str
    type: str
    run_id: str
    at: datetime
    seq: int
    kind: str
    status: str
    data: dict[str, Any]

    @classmethod
    def from_redis(cls, id_: bytes, fields: Mapping[bytes, bytes]) -> Event:
        """From the entry's place and fields."""
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return cls(
            id=id_.decode(),
            type=text["type"],
            run_id=text["run"],
            at=datetime.fromtimestamp(float(text["at"]), UTC),
            seq=int(text.get("seq", "0")),
            kind=text.get("kind", ""),
            status=text.get("status", ""),
            data=json.loads(text["data"]) if text.get("data") else {},
        )


def _run_id(event: Event) -> str:
    return event.run_id


def _place(id_: str) -> tuple[int, int]:
    milliseconds, number = id_.split("-")
    return int(milliseconds), int(number)


def apply(session: Session, run_id: str, events: Sequence[Event]) -> None:
    """Write a run's events, in order, into SQL; a repeat changes nothing."""
    measured: list[metrics.Projected] = []
    run = session.scalar(select(RunRow).where(RunRow.run_id == run_id))
    if run is None:
        # The transaction that made the run was not committed: nobody knows this run.
        log.warning("%s of an unknown run %s", events[0].type, run_id)
        return
    for event in events:
        if event.type == "commit":
            _apply_commit(session, run, event, measured)
        elif run_events.add(
            session, run, event.id, event.type, event.at,
            shown(event.type, event.status, event.data),
        ):  # fmt: skip
            _apply_event(session, run, event, measured)
    metrics.add_projected(session, measured)
    leases.note_seq(session, run_id, run.projected_seq)


def _apply_event(
    session: Session, run: RunRow, event: Event, measured: list[metrics.Projected]
) -> None:
    if event.type == "closed":
        close_row(session, event.run_id, event.status, event.data or None, event.at)
        return
    if event.type == "rolled_back":
        metrics.add_projected(session, measured)
        measured.clear()
        _roll_back(session, run, int(event.data["at_seq"]))
    happened(run, event.type, event.status, event.data, event.at)


def _roll_back(session: Session, run: RunRow, at_seq: int) -> None:
    """What the journal has lost is computed anew under the same seqs. Artifacts are files, and stay."""
    if run.projected_seq > at_seq:
        metrics.forget_after(session, run.run_id, at_seq)
        run.projected_seq = at_seq


def _apply_commit(
    session: Session, run: RunRow, event: Event, measured: list[metrics.Projected]
) -> None:
    if event.seq <= run.projected_seq:
        return
    if "artifact" in event.data:
        artifacts.add_projected(session, run.run_id, event.seq, event.data["artifact"], event.at)
    if event.kind == "complete" and "certificate" in event.data:
        run.certificate = {**event.data["certificate"], "seq": event.seq}
    run.current_step = int(event.data.get("step", run.current_step))
    run.projected_seq = event.seq
    run.updated_at = event.at
    measured += _measured(event)


def _measured(event: Event) -> list[metrics.Projected]:
    numbers = event.data.get("metrics")
    if not numbers:
        return []
    step = int(event.data.get("step", 0))
    return [metrics.Projected(event.run_id, event.seq, step, event.kind, numbers, event.at)]


class Projector:
    """Moves the stream of commits into SQL, batch by batch."""

    def __init__(self, redis: Redis, db: Database, journal: Journal | None = None) -> None:
        """`redis` must not give up before `BLOCK_MS` is over. With `journal`, what is overdue of the Tinker
        SDK's clients is seen to as well."""
        self._redis, self._db = redis, db
        self._token = secrets.token_hex(8)
        self._hold = redis.register_script(_HOLD)
        self._tidied = 0.0
        self._journal, self._swept = journal, 0.0

    def step(self) -> int:
        """One look at the stream, held for at most a second; how many events were written."""
        if not self._hold(keys=[LOCK], args=[self._token, LOCK_MS]):
            time.sleep(BLOCK_MS / 1000)
            return 0
        position = self._position()
        begin = "0-0" if self._went_back(position) else position
        rows = self._read(begin, BLOCK_MS)
        if rows and len(rows) < BATCH:
            time.sleep(GATHER_S)
            rows = self._read(begin, None)
        if rows:
            last = rows[-1][0].decode()
            events = [Event.from_redis(*row) for row in rows]
            self._write(events, position, last)
            self._wake(events)
            self._redis.xtrim(keys.COMMITS, minid=last, approximate=False)
        self._tidy()
        self._sweep()
        return len(rows)

    def _went_back(self, position: str) -> bool:
        """Whether the server has lost its data, and its clock now gives places before the last one read.

        Everything that is there is read again then: what was written before is written once all the same.
        """
        try:
            found = self._redis.xinfo_stream(keys.COMMITS)
        except ResponseError:
            return False
        last = found["last-generated-id"]
        return _place(last.decode() if isinstance(last, bytes) else last) < _place(position)

    def _wake(self, events: list[Event]) -> None:
        for run_id in {event.run_id for event in events if event.type != "commit"}:
            self._redis.publish(keys.DONE, f"{run_id}:{run_events.HAPPENED}")

    def _read(self, position: str, block_ms: int | None) -> list[Any]:
        found = self._redis.xread({keys.COMMITS: position}, count=BATCH, block=block_ms)
        return cast(list[Any], found)[0][1] if found else []

    def release(self) -> None:
        """Let another projector take over at once."""
        if self._redis.get(LOCK) == self._token.encode():
            self._redis.delete(LOCK)

    def _position(self) -> str:
        with self._db.reading() as session:
            row = session.get(ProjectionRow, _NAME)
            return row.position if row is not None else "0-0"

    def _write(self, events: list[Event], before: str, after: str) -> None:
        with self._db.writing() as session:
            if session.get(ProjectionRow, _NAME) is None:
                session.add(ProjectionRow(name=_NAME, position="0-0"))
                session.flush()
            moved = session.execute(
                update(ProjectionRow)
                .where(ProjectionRow.name == _NAME, ProjectionRow.position == before)
                .values(position=after)
                .returning(ProjectionRow.name)
            )
            if moved.first() is None:
                # Another projector has the lock by now and has written these.
                return
            for run_id, of_run in groupby(sorted(events, key=_run_id), key=_run_id):
                apply(session, run_id, list(of_run))

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied > TIDY_S:
            self._tidied = time.monotonic()
            IdempotencyKeys(self._db).forget_old()
            scrub(self._db, self._redis)

    def _sweep(self) -> None:
        if self._journal is not None and time.monotonic() - self._swept > SWEEP_S:
            self._swept = time.monotonic()
            sweep(self._db, self._journal)


def main() -> None:
    """Project until told to stop; an outage of SQL or Redis is waited out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = Settings.from_env()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    redis = connect(settings.redis_url)
    journal = Journal(redis, open_storage(settings), settings)
    projector = Projector(redis, Database(settings.database_url), journal)
    while not stop.is_set():
        try:
            projector.step()
        except (RedisError, SQLAlchemyError, OSError) as error:
            log.warning("waiting: %s", error)
            stop.wait(1.0)
    try:
        projector.release()
    except RedisError as error:
        log.warning("the lock was not released: %s", error)


if __name__ == "__main__":
    main()
