"""How many TCP connections this process has to a server: from /proc, without asking either side."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

ESTABLISHED = "01"


def connections_to(base_url: str) -> int:
    """Established connections of this process to the port of `base_url`."""
    port = f":{urlsplit(base_url).port:04X}"
    own = _own_sockets()
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[2].endswith(port) and row[3] == ESTABLISHED and row[9] in own for row in rows)


def _own_sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


class MostConnections:
    """Looks ten times a second while the block runs; `most` is the greatest number seen."""

    def __init__(self, base_url: str) -> None:
        self.most = 0
        self._base_url = base_url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(5)

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, connections_to(self._base_url))
