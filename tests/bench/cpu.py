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
            fields = _stat(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        seconds[part_of(pid)] += (int(fields[11]) + int(fields[12])) * _TICK_S
    return dict(seconds)


def spent(before: dict[str, float], after: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds per step and part."""
    return {
        part: round((after[part] - before.get(part, 0.0)) / steps * 1e3, 2)
        for part in sorted(after)
    }


def part_of(pid: int) -> str:
    """The part of a stack that a process belongs to; "gone" when it has ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return _part(command, _is_celery(int(_stat(pid)[1])))
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


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
