"""A stack to be broken: its processes by their parts, its fail-points, and runs of the course on it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from redis.exceptions import RedisError

import rewardsignal as rs
from gpu_pool.process import Process
from tests.chaos.course import CONFIG, course
from tests.chaos.loop import Loop, paced
from tests.chaos.points import Points
from tests.support import stack as stacks
from tests.support.api import Api, Run
from tests.support.inside import Inside, until
from tests.support.stack import RunningStack
from web.stack import state
from web.stack.environment import MARK
from web.stack.folder import Folder
from workers.queue import keys

# Snapshots and trims as often as a run of fifty steps needs to see many of them.
SETTINGS = {"SIGNAL_SNAPSHOT_SHARE": "0.3", "SIGNAL_SNAPSHOT_OPERATIONS": "12"}
DEVICES = "cpu:2x1"
# Longer than a process of the stack takes to be started again.
PATIENCE_S = 40.0


class PatientApi(Api):
    """A client that repeats what was not answered, as the SDK does: under the same Idempotency-Key."""

    def get(self, path: str, **kwargs: Any) -> httpx2.Response:
        """GET."""
        return self._answered(lambda: super(PatientApi, self).get(path, **kwargs))

    def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx2.Response:
        """POST."""
        headers = {"Idempotency-Key": secrets.token_hex(12), **kwargs.pop("headers", {})}
        return self._answered(
            lambda: super(PatientApi, self).post(path, json, headers=headers, **kwargs)
        )

    def delete(self, path: str) -> httpx2.Response:
        """DELETE."""
        return self._answered(lambda: super(PatientApi, self).delete(path))

    def _answered(self, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = ask()
                if answer.status_code != 503 or time.monotonic() > deadline:
                    return answer
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)


@dataclass(frozen=True)
class Chaos:
    """A running stack, from outside and from within."""

    stack: RunningStack
    api: Api
    inside: Inside
    points: Points
    # What `signal up` was given, so that it can be given it again.
    options: tuple[str, ...]
    environment: dict[str, str]

    # --- runs ---------------------------------------------------------------------------------

    @contextmanager
    def run(self, **config: Any) -> Iterator[Run]:
        """A run of the course's configuration; cancelled at the end, whatever has died by then."""
        run = Run(self.api, self.api.create(**{**CONFIG, **config}))
        try:
            self.await_status(run, "ready")
            yield run
        finally:
            self.points.clear()
            until(lambda: run.post("/cancel").status_code in (200, 409), 60)

    def train(
        self,
        run: Run,
        before: Callable[[int], None] = lambda _: None,
        operations: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """The course on a run, to its end, by the SDK; `before(index)` is called ahead of every operation.

        `options` of the client, where its own will not do.
        """
        with rs.SignalClient(self.stack.api_key, self.stack.base_url, **options) as client:
            course_of_it = course() if operations is None else operations
            loop = Loop(client.run(run.id), paced(course_of_it, before)).start()
            return loop.join(600)

    def await_status(self, run: Run, *wanted: str, seconds: float = 60) -> dict[str, Any]:
        """The run once it is in one of these states."""

        def look() -> dict[str, Any] | None:
            state: dict[str, Any] = run.get().json()
            if state["status"] in wanted:
                return state
            over = state["status"] in ("completed", "cancelled", "failed")
            assert not over, f"{state['status']}: {state['error']}"
            return None

        return until(look, seconds)

    def certificate(self, run: Run) -> dict[str, Any]:
        """What the run's whole state hashes to."""
        answer = run.get("/certificate", timeout=90)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    # --- processes ----------------------------------------------------------------------------

    def victim(self, name: str, run_id: str) -> Process | None:
        """The process that plays a part now; None when nobody does."""
        pid = self._pid(name, run_id)
        found = Process.of(pid) if pid else None
        return found if found is not None and found.alive() else None

    def _pid(self, name: str, run_id: str) -> int:
        if name in ("worker_child", "worker_parent"):
            node = self.inside.redis.hget(keys.prefix(run_id) + "head", "worker")
            field = "pid" if name == "worker_child" else "parent_pid"
            found = self.inside.redis.hget(keys.worker(node.decode()), field) if node else None
            return int(found or 0)
        if name == "web_worker":
            children = self.children(self.inside.service("web").pid)
            return children[0] if children else 0
        return self.inside.service({"web_master": "web"}.get(name, name)).pid

    def children(self, pid: int) -> list[int]:
        """Child processes."""
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(one) for one in text.split()]

    def supervisor(self) -> Process:
        """`signal up` itself, as the data folder names it."""
        found = state.read(Folder(self.stack.data_dir))
        assert found is not None
        return found.supervisor

    @contextmanager
    def sql(self) -> Iterator[sqlite3.Connection]:
        """The stack's database; what is changed is committed at the end."""
        connection = sqlite3.connect(self.stack.data_dir / "signal.db", timeout=20)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def await_whole(self, seconds: float = 60) -> None:
        """Until every service lives again and the API answers."""

        def whole() -> bool | None:
            alive = all(self.inside.service(name).alive() for name in SERVICES)
            return (alive and self.api.get("/ready").status_code == 200) or None

        until(quietly(whole), seconds)

    def head(self, run_id: str) -> dict[str, str]:
        """The journal's head as it lies in Redis; empty when there is none or no Redis."""
        row = self.inside.redis.hgetall(keys.prefix(run_id) + "head")
        return {name.decode(): value.decode() for name, value in row.items()}

    def applied(self, run_id: str) -> int:
        """The last finished seq."""
        return int(self.head(run_id).get("applied", 0))


SERVICES = ("redis", "web", "agent", "projector")


def quietly(look: Callable[[], Any]) -> Callable[[], Any]:
    """A look that finds nothing while what it asks is away."""

    def looked() -> Any:
        try:
            return look()
        except (AssertionError, OSError, RedisError, httpx2.TransportError):
            return None

    return looked


@contextmanager
def chaos_stack(
    folder: Path, model: Path, *, devices: str = DEVICES, data_dir: Path | None = None, **env: str
) -> Iterator[Chaos]:
    """A stack with fail-points; nothing of it is left at the end."""
    points, data_dir = Points(folder / "points"), data_dir or folder / "data"
    settings = {**SETTINGS, "SIGNAL_FAILPOINTS": str(points.folder), **env}
    try:
        options = ("--model", f"tiny={model}", "--devices", devices)
        stack = stacks.up(data_dir, *options, env=settings)
        with Inside(stack) as inside, PatientApi(stack) as api:
            yield Chaos(stack, api, inside, points, options, settings)
    finally:
        points.clear()
        stacks.down(data_dir)
        keep_logs(data_dir)


def keep_logs(data_dir: Path) -> None:
    """The last stack's logs, to be looked at after a failure (CHAOS_LOGS names the folder)."""
    if target := os.environ.get("CHAOS_LOGS"):
        shutil.copytree(data_dir / "logs", Path(target) / f"{int(time.time() * 1000)}")


@contextmanager
def another_host(chaos: Chaos, folder: Path) -> Iterator[None]:
    """A second agent with a device of its own, on the same database, Redis and storage."""
    first, other = chaos.stack.data_dir, folder / "other"
    other.mkdir(mode=0o700)
    (other / "store").symlink_to(first / "store")
    environment = {
        **os.environ,
        **chaos.inside.environment,
        **stacks.ENVIRONMENT,
        MARK: str(first),
        "SIGNAL_DATA_DIR": str(other),
        "SIGNAL_DATABASE_URL": f"sqlite:///{first / 'signal.db'}",
        "SIGNAL_SECRET": (first / "secret").read_text().strip(),
        "SIGNAL_MODELS": str(first / "models.json"),
        "SIGNAL_HOST_NAME": "other",
        "SIGNAL_DEVICES": "cpu:1x1",
    }
    command = [sys.executable, "-P", "-m", "gpu_pool.agent"]
    with (
        (other / "agent.log").open("wb") as log,
        subprocess.Popen(command, cwd=other, env=environment, stdout=log, stderr=log) as agent,
    ):
        try:
            yield
        finally:
            agent.terminate()
            agent.wait(60)


def restarted(chaos: Chaos) -> None:
    """`signal up` once more, as at the first time: it adopts what lives and starts what does not."""
    stacks.up(chaos.stack.data_dir, *chaos.options, env=chaos.environment)


def kill(process: Process) -> float:
    """SIGKILL, and not a moment before the process is gone; when it was sent."""
    at = time.time()
    process.signal(signal.SIGKILL)
    until(lambda: not process.alive() or None, 10)
    return at
