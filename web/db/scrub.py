"""Taking what was deleted out of the files below SQL and Redis.

SQLite: what is deleted is overwritten (`secure_delete`), but copies that a page made when it was split
may remain, so the file is written anew and its log emptied. Redis: the append-only file is rewritten.
PostgreSQL and a Redis of the operator's own tidy up by themselves, when their operator has set them so.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError

from gpu_pool.database import Database
from web.db.tables import ErasureRow

log = logging.getLogger(__name__)

REWRITE_S = 20.0
EMPTY_LOG_S = 5.0
_LOOK_AGAIN_S = 0.02
# Deletions at the same time share one scrubbing.
_ONE = threading.Lock()


def scrub(db: Database, redis: Redis) -> bool:
    """Do it for every deletion that is noted; False when it must be tried again."""
    with _ONE:
        with db.reading() as session:
            noted = list(session.scalars(select(ErasureRow.id)))
        if not noted:
            return True
        try:
            if not (_rewrite_redis(redis) and _rewrite_sqlite(db)):
                return False
            with db.writing() as session:
                session.execute(delete(ErasureRow).where(ErasureRow.id.in_(noted)))
        except (RedisError, SQLAlchemyError, OSError) as error:
            log.warning("what was deleted is not out of the files yet: %s", error)
            return False
        return True


def _rewrite_sqlite(db: Database) -> bool:
    if db.engine.dialect.name != "sqlite":
        return True
    raw = db.engine.raw_connection()
    try:
        connection: Any = raw.driver_connection
        connection.execute("VACUUM").close()
        return _empty_log(connection)
    except db.engine.dialect.loaded_dbapi.Error as error:
        log.warning("the database's file is not written anew: %s", error)
        return False
    finally:
        raw.close()


def _empty_log(connection: Any) -> bool:
    """Others may be reading: the log is emptied when nobody needs it."""
    deadline = time.monotonic() + EMPTY_LOG_S
    while time.monotonic() < deadline:
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return True
        time.sleep(_LOOK_AGAIN_S)
    return False


def _rewrite_redis(redis: Redis) -> bool:
    deadline = time.monotonic() + REWRITE_S
    while time.monotonic() < deadline:
        found = redis.info("persistence")
        if not found.get("aof_enabled"):
            return True
        try:
            redis.bgrewriteaof()
        except ResponseError as error:
            if "in progress" not in str(error):
                # The operator's own server does not let us.
                log.warning("the server's append-only file is not rewritten: %s", error)
                return True
            # One that began before the deletion may still have it.
            time.sleep(_LOOK_AGAIN_S)
            continue
        return _await_rewrite(redis, deadline)
    return False


def _await_rewrite(redis: Redis, deadline: float) -> bool:
    while time.monotonic() < deadline:
        found = redis.info("persistence")
        if not found["aof_rewrite_in_progress"] and not found.get("aof_rewrite_scheduled"):
            return bool(found.get("aof_last_bgrewrite_status", "ok") == "ok")
        time.sleep(_LOOK_AGAIN_S)
    return False
