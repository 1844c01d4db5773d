"""The journal's ground: the Lua scripts, what they refuse with, and the connection.

Every change of a journal is one script (`lua/`), so it happens whole or not at all.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

from redis import BlockingConnectionPool, Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

from workers.queue import keys
from workers.queue.segments import Segments
from workers.settings import Settings
from workers.storage import Storage

_SCRIPTS = (
    "append", "cancel", "close", "commit", "commit_free", "detached", "expire", "hold", "lost", "move",
    "open", "peek", "place", "release", "reopen", "report", "rewind", "snapshot", "take", "take_ahead",
    "take_free", "trim",
)  # fmt: skip


class Fenced(Exception):
    """Another worker has the run's lease: this one must let go of it."""


class Closed(Exception):
    """The run has ended: there is nothing more to do for it."""


class Behind(Exception):
    """The journal lacks commits that this worker made: they must be put back."""


class Missing(Exception):
    """The journal is gone: the Redis-protocol server has lost its data."""


class Held(Exception):
    """The run is held (paused, rolled back, or rebuilt to other numbers): nothing is taken."""


# Of one process: who finds none free waits for one. Thousands of polls that are woken together would else
# open thousands of connections, or take it for an outage that there is none.
_CONNECTIONS = 64
_REFUSALS = {b"fenced": Fenced, b"closed": Closed, b"missing": Missing, b"held": Held}


def connect(
    url: str,
    *,
    timeout_s: float = 5.0,
    connections: int = _CONNECTIONS,
    retry: Retry | None = None,
) -> Redis:
    """A client that gives up within seconds. redis-py's own defaults may hold a caller for a minute.

    `connections` bounds the commands under way; more than the default only where they wait in the server.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=2.0,
        retry=retry or Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), retries=2),
        health_check_interval=30,
    )
    return Redis.from_pool(pool)


class Scripts:
    """One server's journals, as far as all of their users need them."""

    def __init__(self, redis: Redis, storage: Storage, settings: Settings) -> None:
        """`storage` takes what is too large for Redis."""
        self.redis, self.storage, self.settings = redis, storage, settings
        self.segments = Segments(storage)
        folder = resources.files("workers.queue") / "lua"
        prelude = (folder / "prelude.lua").read_text()
        self._scripts = {
            name: redis.register_script(prelude + (folder / f"{name}.lua").read_text())
            for name in _SCRIPTS
        }

    def _store(self, run_id: str, data: bytes) -> tuple[bytes, str]:
        if len(data) <= self.settings.inline_bytes:
            return data, ""
        key = f"runs/{run_id}/bodies/{secrets.token_hex(12)}"
        self.storage.write(key, data)
        return b"", key

    def _call(self, name: str, run_id: str, *args: Any) -> list[Any]:
        return cast(list[Any], self._scripts[name](keys=[keys.prefix(run_id)], args=args))

    def _call_each(self, name: str, calls: Sequence[tuple[str, Any]]) -> list[list[Any]]:
        """The same script for several runs, each with an argument of its own, in one round trip."""
        pipe, sha = self.redis.pipeline(transaction=False), self._scripts[name].sha
        for run_id, argument in calls:
            pipe.evalsha(sha, 1, keys.prefix(run_id), argument)
        replies = pipe.execute(raise_on_error=False)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            return [self._call(name, run_id, argument) for run_id, argument in calls]
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise reply
        return cast(list[list[Any]], replies)

    @staticmethod
    def _fenced(reply: list[Any]) -> list[Any]:
        for name, error in _REFUSALS.items():
            if reply[0] == name:
                raise error
        return reply
