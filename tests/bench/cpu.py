"""CPU seconds of a stack's processes by their part in it, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from tests.support.stack import RunningStack

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def by_part(stack: RunningStack) -> dict[str, float]:
    """Seconds since each process began, summed by part."""
    seconds: dict[str, float] = defaultdict(float)
    seconds["client"] = sum(os.times()[:2])
    for pid in stack.processes():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parent = int(fields[1])
        seconds[_part(command, _is_celery(parent))] += (int(fields[11]) + int(fields[12])) * _TICK_S
    return dict(seconds)


def spent(before: dict[str, float], after: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds per step and part."""
    return {
        part: round((after[part] - before.get(part, 0.0)) / steps * 1e3, 2)
        for part in sorted(after)
    }


def _part(command: str, child: bool) -> str:
    if "gunicorn" in command:
        return "web"
    if "workers.main:app worker" in command:
        return "worker_child" if child else "worker_parent"
    for word in ("flower", "projector", "agent", "valkey", "redis"):
        if word in command:
            return "redis" if word == "valkey" else word
    return "supervisor"


def _is_celery(pid: int) -> bool:
    try:
        return "workers.main:app worker" in Path(f"/proc/{pid}/cmdline").read_text().replace(
            "\0", " "
        )
    except FileNotFoundError:
        return False
