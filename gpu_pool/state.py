"""What an agent leaves for the next one: a file that names its workers, and a lock.

Workers outlive their agent, so the next one must know which processes are theirs: by pid, start
time and boot. Touches two files in the data folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_pool.process import Process, boot_id
from gpu_pool.workers import Worker


class StateFile:
    """`run/agent.json` in the data folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when it is not there."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / "agent.json"

    def write(self, workers: Iterable[Worker]) -> None:
        """Replaces the file in one step."""
        state = {"boot": boot_id(), "workers": [_record(worker) for worker in workers]}
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(state, indent=1))
        os.replace(aside, self._path)

    def read(self) -> list[Worker]:
        """The workers that the last agent knew, since this boot; a torn file holds none."""
        try:
            state = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return []
        if state["boot"] != boot_id():
            return []
        return [_worker(record) for record in state["workers"]]


@contextmanager
def sole_agent(folder: Path) -> Iterator[None]:
    """Holds the data folder's lock. Raises RuntimeError when another agent does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "agent.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another pool agent serves {folder.parent}; stop it first"
            ) from None
        yield


def _record(worker: Worker) -> dict[str, Any]:
    processes = {"parent": worker.parent, "child": worker.child}
    return {
        "node": worker.node,
        "log": str(worker.log),
        **{
            name: [process.pid, process.started] if process else None
            for name, process in processes.items()
        },
    }


def _worker(record: dict[str, Any]) -> Worker:
    worker = Worker(record["node"], Process(*record["parent"]), Path(record["log"]))
    worker.child = Process(*record["child"]) if record["child"] else None
    return worker
