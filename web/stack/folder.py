"""The data folder of a stack: what lies where, and who may read it (its owner alone).

Touches that folder only. Secrets are written once, 0600, and read back afterwards.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from web.stack.errors import StackError


@dataclass(frozen=True)
class Folder:
    """Paths beneath `root`, the data folder."""

    root: Path

    @property
    def state(self) -> Path:
        """What runs now: pids, ports, addresses."""
        return self.root / "stack.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor for as long as it lives."""
        return self.root / "stack.lock"

    @property
    def secret(self) -> Path:
        """The key that signs future ids and cursors."""
        return self.root / "secret"

    @property
    def api_key(self) -> Path:
        """The first user's API key, so that a second `up` can print it again."""
        return self.root / "api_key"

    @property
    def flower_login(self) -> Path:
        """`user:password` of Flower."""
        return self.root / "flower_login"

    @property
    def redis(self) -> Path:
        """The Redis-protocol server's configuration, password and append-only file."""
        return self.root / "redis"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"

    @property
    def working(self) -> Path:
        """The empty working directory of every process: no file there can be taken for a module of ours."""
        return self.root / "empty"

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.logs / f"{name}.log"

    def prepare(self) -> None:
        """Makes what is missing, and closes what others could read. Raises StackError."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.redis, self.logs, self.working):
                folder.mkdir(mode=0o700, exist_ok=True)
            if stat.S_IMODE(self.root.stat().st_mode) & 0o077:
                self.root.chmod(0o700)
        except OSError as error:
            raise StackError(f"cannot use {self.root} as the data folder: {error}") from None
        if strangers := sorted(path.name for path in self.working.iterdir()):
            raise StackError(f"{self.working} must be empty; remove {', '.join(strangers)}")
        once(self.secret, lambda: secrets.token_urlsafe(32))
        once(self.flower_login, lambda: f"signal:{secrets.token_urlsafe(18)}")


def default_folder() -> Path:
    """SIGNAL_DATA_DIR, else the user's data folder."""
    if chosen := os.environ.get("SIGNAL_DATA_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "signal"


def once(path: Path, make: Callable[[], str]) -> str:
    """The contents of a secret file, made at the first call."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        write_private(path, make() + "\n")
        return path.read_text().strip()


def write_private(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read, in one step: a reader sees all of it or the old."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
