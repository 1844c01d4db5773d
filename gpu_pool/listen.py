"""Wakes the agent when something happens to a run: a thread that listens to one Redis channel.

Only saves time: the agent looks by itself twice a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Thread

from redis import Redis
from redis.exceptions import RedisError

from workers.queue import keys

log = logging.getLogger(__name__)


class Listener:
    """Calls `wake(run_id)` for every message on the pool's channel."""

    def __init__(self, url: str, wake: Callable[[str], None]) -> None:
        """Uses a connection of its own, which may wait for ever."""
        self._redis = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=2.0)
        self._wake = wake

    def start(self) -> None:
        """Starts the thread, which ends with the process."""
        Thread(target=self._run, name="listener", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._listen()
            except (RedisError, OSError) as error:
                log.debug("not listening: %s", error)
            time.sleep(0.5)

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
            channel.subscribe(keys.POOL)
            for message in channel.listen():
                self._wake(message["data"].decode())
