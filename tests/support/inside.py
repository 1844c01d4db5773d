"""Looks into a running stack past its API: its Redis, its queues, its processes. For tests that tamper."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar, cast

import httpx2
from redis import Redis

from gpu_pool.process import Process
from tests.support.stack import RunningStack
from web.stack import state
from web.stack.folder import Folder
from workers.queue import keys

T = TypeVar("T")


def until(what: Callable[[], T | None], seconds: float = 30.0) -> T:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return answer


class Inside:
    """One running stack, from within."""

    def __init__(self, stack: RunningStack) -> None:
        """Connects at the first use."""
        self._stack, self._folder = stack, Folder(stack.data_dir)
        self.redis: Any = Redis.from_url(self.redis_url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.redis.close()

    @property
    def redis_url(self) -> str:
        """Where the Redis-protocol server is, with its password."""
        return self.environment["REDIS_URL"]

    @property
    def environment(self) -> dict[str, str]:
        """The stack's settings, as its processes got them."""
        return dict(self._state().environment)

    def service(self, name: str) -> Process:
        """The present process of a service: redis, web, agent, projector, flower."""
        return self._state().processes[name]

    def await_restart(self, old: Process, name: str, seconds: float = 30.0) -> Process:
        """The process that the supervisor started in place of `old`."""

        def another() -> Process | None:
            now = self.service(name)
            return now if now != old and now.alive() else None

        return until(another, seconds)

    def worker_pids(self, run_id: str) -> tuple[int, int]:
        """Parent and child of the worker that holds a run."""
        node = self.redis.hget(keys.prefix(run_id) + "head", "worker").decode()
        found = self.redis.hmget(keys.worker(node), "parent_pid", "pid")
        return int(found[0]), int(found[1])

    @contextmanager
    def frozen(self, run_id: str) -> Iterator[None]:
        """The run's worker stands still, so that its queue can be handled at leisure."""
        pids = self.worker_pids(run_id)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)

    def rewrite_queue(self, run_id: str, change: Callable[[list[bytes]], list[bytes]]) -> int:
        """Replaces the messages on a run's queue; how many there were."""
        name = keys.queue(run_id)
        pipe = self.redis.pipeline(transaction=True)
        pipe.lrange(name, 0, -1)
        pipe.delete(name)
        messages = cast(list[bytes], pipe.execute()[0])
        if changed := change(messages):
            self.redis.rpush(name, *changed)
        return len(messages)

    def broker_keys(self, run_id: str) -> list[bytes]:
        """What the broker holds for a run: queue and bindings; and its book of unacknowledged messages."""
        name = keys.queue(run_id).encode()
        return [key for key in self.redis.keys("*") if name in key or key.startswith(b"unacked")]

    def flower_tasks(self, run_id: str) -> list[str]:
        """Names of the tasks that Flower has seen succeed or fail for a run."""
        user, password = self._stack.flower_login.split(":", 1)
        answer = httpx2.get(
            f"{self._stack.flower_url}/api/tasks",
            params={"limit": 500, "sort_by": "-received"},
            auth=(user, password), timeout=30, trust_env=False,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        return [
            task["name"]
            for task in answer.json().values()
            if run_id in (task["args"] or "") and task["state"] in ("SUCCESS", "FAILURE")
        ]

    def _state(self) -> state.State:
        found = state.read(self._folder)
        assert found is not None
        return found
