"""Percentiles, and a stack that lives as long as a benchmark."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient
from tests.bench import cpu
from tests.support import stack as stacks
from tests.support.stack import RunningStack

# At rest a stack uses less than this share of a core, over so many seconds.
_REST, _LOOK_S = 0.5, 1.0


def milliseconds(
    call: Callable[[], Any], times: int, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """p50 and p90 of `call`; `before` runs untimed ahead of each."""
    found = []
    for _ in range(times):
        if before is not None:
            before()
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e3)
    return percentiles(found)


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p90 and the number of values."""
    ranked = sorted(values)
    return {
        "p50": round(ranked[len(ranked) // 2], 2),
        "p90": round(ranked[len(ranked) * 9 // 10], 2),
        "n": len(ranked),
    }


@contextmanager
def running(
    model: str, folder: Path, devices: str, **environment: str
) -> Iterator[tuple[RunningStack, SignalClient]]:
    """A stack with one model, and a client of it."""
    with tempfile.TemporaryDirectory(prefix="signal-bench-") as data_dir:
        say(f"starting a stack for {model} {environment or ''}")
        options = ("--devices", devices, "--model", f"{model}={folder}")
        stack = stacks.up(Path(data_dir) / "data", *options, env=environment)
        try:
            with SignalClient(api_key=stack.api_key, base_url=stack.base_url) as client:
                yield stack, client
        finally:
            stacks.down(stack.data_dir)


def at_rest(stack: RunningStack, within_s: float = 60.0) -> None:
    """Wait until the stack does nothing beside what is measured, such as warming a spare worker."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        before = _busy_s(stack)
        time.sleep(_LOOK_S)
        if _busy_s(stack) - before < _REST * _LOOK_S:
            return
    say("  the stack is not at rest")


def _busy_s(stack: RunningStack) -> float:
    return sum(seconds for part, seconds in cpu.by_part(stack).items() if part != "client")


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
