"""Celery events per operation, for Flower, when doorbells are coalesced.

With one message per operation Celery sends them itself. With one message for many, the session says
for each entry what Celery would have said; the id is "<run_id>-<seq>". Sent in groups, since an event
per message costs more than a small operation.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from workers.queue.records import Outcome, Taken
from workers.settings import Settings

log = logging.getLogger(__name__)

FLUSH_S = 0.1


class OperationEvents:
    """Does nothing unless the setting is `coalesced`."""

    def __init__(self, app: Celery, settings: Settings, node: str) -> None:
        """The connection is made at the first event."""
        self.enabled = settings.doorbell == "coalesced"
        self._app, self._node = app, node
        self._dispatcher: Any = None
        self._flushed_at = 0.0

    def started(self, taken: Taken) -> None:
        """The operation was taken from the journal."""
        if self.enabled:
            uuid = self._uuid(taken)
            self._send(
                "task-received",
                uuid,
                name=taken.kind,
                args=repr((taken.run_id, taken.number)),
                kwargs="{}",
                timestamp=taken.submitted_at,
            )
            self._send("task-started", uuid, timestamp=taken.started_at)

    def finished(self, taken: Taken, outcome: Outcome) -> None:
        """The operation's outcome is committed."""
        if not self.enabled:
            return
        runtime = time.time() - taken.started_at
        if outcome.status == "completed":
            self._send("task-succeeded", self._uuid(taken), result="", runtime=runtime)
        else:
            error = (outcome.error or {}).get("message", "")
            self._send("task-failed", self._uuid(taken), exception=error, traceback="")
        if time.monotonic() - self._flushed_at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what is gathered; events are for eyes, so a failure to send is only logged."""
        if self._dispatcher is None:
            return
        self._flushed_at = time.monotonic()
        try:
            self._dispatcher.flush()
        except (OperationalError, OSError) as error:
            log.warning("events not sent: %s", error)

    def _uuid(self, taken: Taken) -> str:
        return f"{taken.run_id}-{taken.seq}"

    def _send(self, kind: str, uuid: str, **fields: object) -> None:
        try:
            if self._dispatcher is None:
                self._dispatcher = self._app.events.Dispatcher(
                    self._app.connection_for_write(),
                    hostname=self._node,
                    buffer_group={"task"},
                    buffer_limit=200,
                )
            self._dispatcher.send(kind, uuid=uuid, **fields)
        except (OperationalError, OSError) as error:
            log.warning("event not sent: %s", error)
