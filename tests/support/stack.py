"""A real stack for tests, started and stopped by the same commands that users type."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from web.stack import leftovers
from web.stack.folder import Folder

SIGNAL = str(Path(sys.executable).parent / "signal")
# Small machines run the tests: one thread per process, and no server that the tests' shell names.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
_DROPPED = ("REDIS_URL", "SIGNAL_")


@dataclass(frozen=True)
class RunningStack:
    """What `signal up --json` printed."""

    base_url: str
    api_key: str
    data_dir: Path
    flower_url: str
    flower_login: str
    pid: int

    def new_user(self, name: str) -> str:
        """Makes a user; returns a key."""
        created = signal("keys", "create", "--user", name, "--json", "--data-dir", self.data_dir)
        return str(json.loads(created)["api_key"])

    def processes(self) -> list[int]:
        """The pids of everything that belongs to it, the supervisor's among them."""
        return [self.pid, *(process.pid for process in leftovers.marked(Folder(self.data_dir)))]


@cache
def config_dir() -> str:
    """Where this process's stacks and clients keep profiles: never in a real home."""
    folder = tempfile.mkdtemp(prefix="signal-config-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """What `signal` is run in: the test's environment without a server that it names."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_DROPPED)}
    return inherited | ENVIRONMENT | {"SIGNAL_CONFIG_DIR": config_dir()}


def up(data_dir: Path, *options: object, **run: Any) -> RunningStack:
    """`signal up --detach`, on any free port."""
    common = ("up", "--detach", "--json", "--port", "0", "--data-dir", data_dir)
    facts = json.loads(signal(*common, *options, **run))
    return RunningStack(**facts | {"data_dir": Path(facts["data_dir"])})


def down(data_dir: Path) -> None:
    """`signal down`; fails when a process is left."""
    signal("down", "--data-dir", data_dir)
    left = leftovers.marked(Folder(data_dir))
    assert not left, f"left behind: {left}"


def signal(*arguments: object, **run: Any) -> str:
    """Runs `signal …`; returns its stdout. Fails with its stderr."""
    done = attempt(*arguments, **run)
    assert done.returncode == 0, f"signal {arguments[0]} failed: {done.stdout}{done.stderr}"
    return done.stdout


def attempt(
    *arguments: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    text: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs `signal …` to its end, well or not; `text` is its standard input."""
    return subprocess.run(
        [SIGNAL, *map(str, arguments)],
        cwd=cwd,
        env=environment() | (env or {}),
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
