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
from tests.support import stack as stacks
from tests.support.stack import RunningStack


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


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
