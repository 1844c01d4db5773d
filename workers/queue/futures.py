"""Future ids, and the hub that lets a web process hold many long polls with one subscription."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.queue import keys
from workers.settings import Settings

log = logging.getLogger(__name__)

_FUTURE = re.compile(r"fut_([0-9a-f]{16})_([1-9][0-9]{0,15})_([0-9a-f]{8})_([0-9a-f]{12})\Z")


def future_id(settings: Settings, run_id: str, entry: int, tag: str) -> str:
    """The id of an entry's future: signed, so it can be judged without the journal."""
    bare = f"{run_id.removeprefix('run_')}_{entry}_{tag}"
    return f"fut_{bare}_{_mac(settings, bare)}"


def parse_future_id(settings: Settings, text: str) -> tuple[str, int, str]:
    """(run_id, entry, tag). Raises SignalError not_found for what this server never gave out."""
    match = _FUTURE.match(text)
    if match:
        run, entry, tag, mac = match.groups()
        if hmac.compare_digest(mac, _mac(settings, f"{run}_{entry}_{tag}")):
            return f"run_{run}", int(entry), tag
    raise SignalError("not_found", "There is no such future, or it is not yours.")


def _mac(settings: Settings, bare: str) -> str:
    return hmac.new(settings.secret.encode(), bare.encode(), hashlib.sha256).hexdigest()[:12]


class FutureHub:
    """Waits for finished entries. One thread and one connection per process, started at the first wait."""

    def __init__(self, redis: Redis, heard: Callable[[str], None] = lambda message: None) -> None:
        """`redis` is used for its connection settings; the subscription has a connection of its own.

        `heard` is told every message, and "" when some may have been missed.
        """
        self._redis, self._heard = redis, heard
        self._lock = threading.Lock()
        self._waiters: dict[str, set[threading.Event]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self._subscribed = threading.Event()
        self._closing = threading.Event()

    def close(self) -> None:
        """End the thread, before its connection is taken away. Waits at most a few seconds."""
        self._closing.set()
        if self._thread is None:
            return
        try:
            self._redis.publish(keys.DONE, "")
        except RedisError as error:
            log.debug("the hub's thread sees its server away by itself: %s", error)
        self._thread.join(timeout=5.0)

    @contextmanager
    def watch(self, run_id: str, entries: Collection[int] = ()) -> Iterator[threading.Event]:
        """An event that is set when one of the entries finishes (none given: any entry of the run).

        Register first, then look at the journal, then wait: what finishes in between is not missed.
        The event is also set when the subscription was interrupted, since messages may be lost.
        """
        self.start()
        self._subscribed.wait(timeout=2.0)
        names = [f"{run_id}:{entry}" for entry in entries] or [run_id]
        event = threading.Event()
        with self._lock:
            for name in names:
                self._waiters[name].add(event)
        try:
            yield event
        finally:
            with self._lock:
                for name in names:
                    self._drop(name, event)

    def _drop(self, name: str, event: threading.Event) -> None:
        found = self._waiters.get(name)
        if found is not None:
            found.discard(event)
            if not found:
                del self._waiters[name]

    def start(self) -> None:
        """Begin to listen. Not in the constructor: gunicorn forks later, and threads do not survive that."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._listen, name="future-hub", daemon=True)
                self._thread.start()

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                with self._redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]
                    pubsub.subscribe(keys.DONE)
                    self._wake_all()
                    while not self._closing.is_set():
                        message = pubsub.get_message(timeout=10.0)
                        if message is None:
                            pubsub.ping()
                        elif message["type"] == "subscribe":
                            self._subscribed.set()
                            self._wake_all()
                        elif message["type"] == "message":
                            self._wake(message["data"].decode())
            except Exception as error:
                # Whatever it is (redis-py lets more than its own errors out of a torn connection),
                # the process's long polls hang on this thread: it subscribes anew.
                log.warning("future hub lost its subscription: %r", error)
                self._subscribed.clear()
                self._wake_all()
                self._closing.wait(0.2)

    def _wake(self, name: str) -> None:
        self._heard(name)
        run_id = name.rsplit(":", 1)[0]
        with self._lock:
            events = [*self._waiters.get(name, ()), *self._waiters.get(run_id, ())]
        for event in events:
            event.set()

    def _wake_all(self) -> None:
        self._heard("")
        with self._lock:
            events = [event for found in self._waiters.values() for event in found]
        for event in events:
            event.set()
