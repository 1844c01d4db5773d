"""What a web process holds: connections, caches, the hub. One `Services` per application.

Everything here connects at its first use, never when it is made: gunicorn may fork in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

from flask import current_app, g
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from gpu_pool.database import Database
from schemas.errors import SignalError
from web.accounts.auth_cache import AuthCache
from web.accounts.service import User
from web.admission import Admission
from web.runs.facts import RunFactsCache
from workers.catalogue import Catalogue
from workers.queue.app import make_app, release_queue, ring
from workers.queue.futures import FutureHub
from workers.queue.journal import Journal, connect
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger(__name__)


class Services:
    """The parts that views work with."""

    def __init__(self, settings: Settings) -> None:
        """Builds the parts; connects to nothing."""
        self.settings = settings
        self.db = Database(settings.database_url)
        # Fewer repeats than a worker makes: they multiply, and a client waits for the answer.
        impatient = partial(connect, settings.redis_url, timeout_s=4.0, retry=Retry(NoBackoff(), 1))
        self.redis = impatient()
        # For those who wait in Redis itself, each of whom has a place for a long poll.
        self.waiting_redis = impatient(connections=max(1, settings.max_waits))
        self.storage = open_storage(settings)
        self.journal = Journal(self.redis, self.storage, settings)
        self.facts = RunFactsCache(self.db, lambda: self.hub.start())
        self.hub = FutureHub(self.redis, self.facts.heard)
        self.catalogue = Catalogue(settings)
        self.auth = AuthCache(self.db)
        self.admission = Admission(polls=settings.max_waits)
        self._celery = make_app(settings)
        # A request must not hang with the broker: by default kombu tries for ever to reach it, and a
        # broker that is reached but silent would hold the doorbell for half a minute.
        self._celery.conf.broker_transport_options = {
            **self._celery.conf.broker_transport_options,
            "socket_timeout": 4,
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
        }
        self._waits = threading.BoundedSemaphore(settings.max_waits)

    def close(self) -> None:
        """Let go of every connection; for processes that end before their interpreter does."""
        self.hub.close()
        self._celery.close()
        self.redis.close()
        self.waiting_redis.close()
        self.db.close()

    def ring(self, run_id: str, admitted: list[tuple[int, str]], bell_was_free: bool) -> None:
        """Ring the run's doorbell. A failure loses nothing: the agent rings again."""
        try:
            ring(self._celery, self.settings, run_id, admitted, bell_was_free)
        except (OperationalError, OSError) as error:
            log.warning("the doorbell of %s was not rung: %s", run_id, error)

    def forget_queue(self, run_id: str) -> None:
        """Delete what the broker holds for a run."""
        release_queue(self._celery, run_id)

    @contextmanager
    def wait_slot(self) -> Iterator[bool]:
        """Takes one of the process's places for long polls; False when none is free."""
        taken = self._waits.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._waits.release()

    @contextmanager
    def long_poll(self) -> Iterator[None]:
        """As `wait_slot`, but raises SignalError too_many_waits when no place is free."""
        with self.wait_slot() as taken:
            if not taken:
                raise SignalError("too_many_waits")
            yield


def services() -> Services:
    """The current application's services."""
    return cast(Services, current_app.extensions["signal"])


def user() -> User:
    """Who asks; views behind authentication only."""
    return cast(User, g.user)
