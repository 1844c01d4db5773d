"""What the agent says to a worker, and what it reads of it, by way of the Redis-protocol server.

Work goes to the worker's own queue as tasks; the queues that it consumes are changed by Celery's
remote control. Touches Redis and the broker only; every call may raise a connection error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from celery import Celery
from redis import Redis

from workers.queue import keys
from workers.queue.app import delete_queue, publish

_REPLY_S = 1.0


@dataclass(frozen=True)
class Report:
    """What a worker's child process last said of itself: the `runs` that it holds, or loads, and the `model`
    that it loaded last, empty for none.

    `progress` changes with everything it does; `warm` when a first run costs it nothing more.
    """

    pid: int
    runs: frozenset[str]
    model: str
    heartbeat: str
    progress: str = ""
    warm: bool = False


class WorkerControl:
    """Talks to the workers by their node names."""

    def __init__(self, app: Celery, redis: Redis) -> None:
        """`app` is the application that the workers run."""
        self._app, self._redis = app, redis

    def report(self, node: str) -> Report | None:
        """What the worker reports; None before its first word."""
        row = cast(dict[bytes, bytes], self._redis.hgetall(keys.worker(node)))
        text = {key.decode(): value.decode() for key, value in row.items()}
        if not text.get("pid"):
            return None
        return Report(
            int(text["pid"]),
            frozenset(filter(None, text.get("runs", "").split(","))),
            text.get("model", ""),
            text.get("heartbeat", ""),
            text.get("progress", ""),
            text.get("state") == "warm",
        )

    def hello(self, node: str) -> None:
        """Asks the worker's child to report itself."""
        publish(self._app, keys.host_queue(node), "hello", [])

    def warm(self, node: str) -> None:
        """Has the worker's child do once, ahead of time, what a first run would wait for."""
        publish(self._app, keys.host_queue(node), "warm", [])

    def attach(self, node: str, run_id: str, epoch: int, spec: dict[str, Any]) -> None:
        """Hands a run to the worker, beside those that it has. Also what makes it notice a queue that was
        just added."""
        publish(self._app, keys.host_queue(node), "attach", [run_id, epoch, spec])

    def detach(self, node: str, run_id: str) -> None:
        """Tells the worker to let go of a run: of one that goes on, with a last snapshot."""
        publish(self._app, keys.host_queue(node), "detach", [run_id])

    def add_queue(self, node: str, run_id: str) -> bool:
        """Has the worker consume the run's queue; False when it did not confirm that in time."""
        return bool(
            self._app.control.add_consumer(
                keys.queue(run_id), destination=[node], reply=True, timeout=_REPLY_S, limit=1
            )
        )

    def drop_queue(self, node: str, run_id: str) -> bool:
        """Ends `add_queue`; False when the worker did not confirm that in time."""
        return bool(
            self._app.control.cancel_consumer(
                keys.queue(run_id), destination=[node], reply=True, timeout=_REPLY_S, limit=1
            )
        )

    def forget(self, node: str) -> None:
        """Removes what a dead worker left: its report and its queue."""
        delete_queue(self._app, keys.host_queue(node))
        self._redis.delete(keys.worker(node))
