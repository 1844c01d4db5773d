"""Resident megabytes of a stack's processes by their part in it, from /proc."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path

from tests.bench.cpu import part_of
from tests.support.stack import RunningStack

_PAGE = os.sysconf("SC_PAGE_SIZE")


def by_part(stack: RunningStack) -> dict[str, float]:
    """Megabytes now."""
    held: dict[str, float] = defaultdict(float)
    for pid in stack.processes():
        part = part_of(pid)
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        held[part] += pages * _PAGE / 1e6
    return {part: round(value, 1) for part, value in sorted(held.items())}


def settled(stack: RunningStack, seconds: float = 5.0) -> dict[str, float]:
    """Megabytes once nothing goes on any more."""
    time.sleep(seconds)
    return by_part(stack)
