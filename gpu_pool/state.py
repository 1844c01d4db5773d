"""What an agent leaves for the next one: a file that names its workers, and a lock.

Workers outlive their agent, so the next one must know which processes are theirs, by pid, start time
and boot, and which leases each of them serves. Touches two files in the data folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_pool.process import Process, boot_id
from gpu_pool.workers import Worker


@dataclass(frozen=True)
class Held:
    """A lease that a worker serves; `ready`: its run was."""

    lease_id: int
    epoch: int
    ready: bool


@dataclass(frozen=True)
class Record:
    """A worker, where it is and what it does.

    `slot` is empty for a spare that has none; `pins` is what it was pinned to. `ending`: it was being ended.
    """

    worker: Worker
    slot: str
    pins: dict[str, str]
    held: tuple[Held, ...]
    ending: bool


class StateFile:
    """`run/agent.json` in the data folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when it is not there."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / "agent.json"

    def write(self, records: Iterable[Record]) -> None:
        """Replaces the file in one step."""
        state = {"boot": boot_id(), "workers": [_plain(record) for record in records]}
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(state, indent=1))
        os.replace(aside, self._path)

    def read(self) -> list[Record]:
        """What the last agent knew, since this boot; a file that cannot be read names nobody."""
        try:
            state = json.loads(self._path.read_text())
            return [_record(row) for row in state["workers"]] if _is_now(state["boot"]) else []
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return []


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


def _is_now(boot: str) -> bool:
    return boot == boot_id()


def _plain(record: Record) -> dict[str, Any]:
    worker = record.worker
    processes = {"parent": worker.parent, "child": worker.child}
    return {
        "node": worker.node,
        "log": str(worker.log),
        "log_mark": worker.log_mark,
        **{
            name: [process.pid, process.started] if process else None
            for name, process in processes.items()
        },
        "slot": record.slot,
        "pins": record.pins,
        "held": [asdict(one) for one in record.held],
        "ending": record.ending,
    }


def _record(row: dict[str, Any]) -> Record:
    worker = Worker(row["node"], Process(*row["parent"]), Path(row["log"]))
    worker.child = Process(*row["child"]) if row["child"] else None
    worker.log_mark = int(row["log_mark"])
    held = tuple(Held(**one) for one in row["held"])
    return Record(worker, row["slot"], row["pins"], held, row["ending"])
