"""Who a key belongs to, remembered for seconds, so that an operation asks SQL nothing."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from gpu_pool.database import Database
from web.accounts import keys, service
from web.accounts.service import User

log = logging.getLogger(__name__)

KNOWN_S = 10.0
UNKNOWN_S = 5.0
MAX_KEYS = 10_000


class AuthCache:
    """Maps a key's hash to its owner or to None; one per process."""

    def __init__(self, db: Database) -> None:
        """Reads `db` on a miss."""
        self._db = db
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, User | None]] = {}
        self._marked: dict[str, float] = {}

    def user(self, text: str) -> User | None:
        """The key's owner; None for a key that opens nothing."""
        if keys.public_id(text) is None:
            return None
        name, now = keys.digest(text), time.monotonic()
        found = self._known.get(name)
        if found is not None and found[0] > now:
            return found[1]
        owner = service.user_of_key(self._db, text)
        with self._lock:
            if len(self._known) >= MAX_KEYS:
                self._known.clear()
            self._known[name] = (now + (KNOWN_S if owner else UNKNOWN_S), owner)
        if owner is not None:
            self._mark(name, text, now)
        return owner

    def _mark(self, name: str, text: str, now: float) -> None:
        step = service.USED_STEP.total_seconds()
        with self._lock:
            if now - self._marked.get(name, -step) < step:
                return
            if len(self._marked) >= MAX_KEYS:
                self._marked.clear()
            self._marked[name] = now
        try:
            service.mark_used(self._db, text)
        except SQLAlchemyError as error:
            # Only a note for the operator: the request does not depend on it.
            log.warning("last use of a key was not noted: %s", error)
