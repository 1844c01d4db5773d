"""A second client, in a process of its own: asks for the state of a run again and again meanwhile.

Its lines on stdout are `end time, milliseconds, status`; it ends when its stdin does.
"""

from __future__ import annotations

import http.client
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.load import Client

EVERY_S = 0.1


def main() -> None:
    """`python -m tests.bench.heartbeat BASE_URL API_KEY PATH`."""
    base_url, api_key, path = sys.argv[1:]
    client = Client(base_url, api_key)
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        begun = time.monotonic()
        try:
            status = str(client.request("GET", path)[0])
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        print(f"{time.time():.3f} {(time.monotonic() - begun) * 1e3:.2f} {status}", flush=True)


@dataclass
class Beats:
    """What one such client saw, from its file."""

    file: Path
    begun: float = field(default_factory=time.time)

    def report(self) -> dict[str, Any]:
        """Milliseconds since the last report, and every status but 200."""
        since, self.begun = self.begun, time.time()
        rows = [line.split() for line in self.file.read_text().splitlines()]
        rows = [row for row in rows if len(row) == 3 and float(row[0]) >= since]
        ranked = sorted(float(row[1]) for row in rows) or [0.0]
        return {
            "n": len(rows),
            "p50": ranked[len(ranked) // 2],
            "p95": ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)],
            "max": ranked[-1],
            "not_200": sum(row[2] != "200" for row in rows),
        }


@contextmanager
def beating(base_url: str, api_key: str, path: str, file: Path) -> Iterator[Beats]:
    """Such a client while the block runs."""
    command = [sys.executable, "-m", "tests.bench.heartbeat", base_url, api_key, path]
    with file.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
        try:
            yield Beats(file)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    main()
