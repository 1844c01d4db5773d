"""stack.json: what runs for a data folder, so that other commands and a later `up` find it.

Reads and writes that file and the lock; it holds the settings of the running stack, secrets among them,
so it is the owner's alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_pool.process import Process, boot_id
from web.stack.folder import Folder, write_private


@dataclass
class State:
    """The supervisor, its processes by name, and the addresses that clients need."""

    supervisor: Process
    boot: str
    version: str = ""
    host: str = ""
    base_url: str = ""
    flower_url: str = ""
    ready: bool = False
    started_at: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)

    def everyone(self) -> list[Process]:
        """Every recorded process, unless the machine was booted since: pids mean nothing then."""
        if self.boot != boot_id():
            return []
        return [self.supervisor, *self.processes.values()]

    def supervised(self) -> bool:
        """Whether the supervisor lives."""
        return self.boot == boot_id() and self.supervisor.alive()


def read(folder: Folder) -> State | None:
    """What was recorded last; None when nothing is, or it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(folder.state.read_text())
        supervisor = Process(**found.pop("supervisor"))
        processes = {name: Process(**facts) for name, facts in found.pop("processes").items()}
        return State(supervisor=supervisor, processes=processes, **found)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(folder: Folder, state: State) -> None:
    """Records the state in one step."""
    write_private(folder.state, json.dumps(asdict(state), indent=1) + "\n")


def lock(folder: Folder) -> int | None:
    """Takes the data folder for this process; None when a supervisor has it.

    The lock goes when the process does, however it ends; the descriptor is not inherited.
    """
    descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def locked(folder: Folder) -> bool:
    """Whether a supervisor has the data folder."""
    if not folder.lock.exists():
        return False
    descriptor = lock(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False
