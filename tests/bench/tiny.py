"""The service's own cost: a model of 2 layers x 64, one sequence of 32 tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient, SignalRun
from tests.bench import cpu
from tests.bench.timing import at_rest, milliseconds, percentiles, running, say
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

ROW = [{"tokens": list(range(4, 36))}]
PAIRS = 50


def measure(bursts: int) -> dict[str, Any]:
    """Latencies and pipelined steps per second, with both kinds of doorbells, and the bare loop."""
    with tempfile.TemporaryDirectory(prefix="signal-bench-") as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        found: dict[str, Any] = {"in_process": in_process(model)}
        for doorbell in ("each", "coalesced"):
            with running("tiny", model, "cpu:1x1", SIGNAL_DOORBELL=doorbell) as (stack, client):
                found[f"doorbell_{doorbell}"] = through_the_stack(stack, client, bursts)
    return found


def through_the_stack(stack: RunningStack, client: SignalClient, bursts: int) -> dict[str, Any]:
    """All figures of one stack."""
    run = client.create_run("tiny", lora_r=8)
    for _ in range(20):
        run.forward_backward(ROW)
        run.optim_step()
    at_rest(stack)
    say("  latencies")
    found: dict[str, Any] = {
        "tokenizer_info_ms": milliseconds(run.tokenizer_info, 100),
        "forward_backward_ms": milliseconds(lambda: run.forward_backward(ROW), 150),
        "optim_step_ms": milliseconds(
            run.optim_step, 150, before=lambda: run.forward_backward(ROW)
        ),
        "sample_1x16_ms": milliseconds(lambda: run.sample(["a"], max_tokens=16, stop=[]), 30),
        "sample_n16x16_tokens_per_s": per_second(256, lambda: sample_many(run)),
        "sample_64_requests_x16_tokens_per_s": per_second(1024, lambda: sample_at_once(run, 64)),
        "worker_ms": worker_times(run),
    }
    for name, burst in (("one_request_per_operation", one_by_one), ("batched_requests", batched)):
        say(f"  pipelined, {name}")
        before, speeds = cpu.by_part(stack), []
        for _ in range(bursts):
            started = time.perf_counter()
            burst(run)
            speeds.append(PAIRS / (time.perf_counter() - started))
        found[f"pipelined_{name}"] = {
            "steps_per_s": percentiles(speeds)
            | {"min": round(min(speeds), 1), "max": round(max(speeds), 1)},
            "cpu_ms_per_step": cpu.spent(before, cpu.by_part(stack), bursts * PAIRS),
        }
    run.complete(save=False)
    return found


def per_second(count: int, work: Callable[[], None], times: int = 10) -> dict[str, float]:
    """So many of something per second, by repeats."""
    speeds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        speeds.append(count / (time.perf_counter() - started))
    return percentiles(speeds)


def sample_many(run: SignalRun) -> None:
    """16 samples of one prompt, 16 tokens each."""
    run.sample(["a"], n=16, max_tokens=16, stop=[])


def sample_at_once(run: SignalRun, count: int) -> None:
    """So many requests of 16 tokens, all under way together."""
    futures = [run.sample_async(["a"], max_tokens=16, stop=[], seed=at) for at in range(count)]
    for future in futures:
        future.result(timeout=120)


def one_by_one(run: SignalRun) -> None:
    """Every operation by a request of its own, all submitted before the first result is asked for."""
    futures: list[Any] = []
    for _ in range(PAIRS):
        futures += [run.forward_backward_async(ROW), run.optim_step_async()]
    for future in futures:
        future.result(timeout=120)


def batched(run: SignalRun) -> None:
    """The same through POST /runs/{id}/operations."""
    futures: list[Any] = []
    with run.pipeline() as pipe:
        for _ in range(PAIRS):
            futures += [pipe.forward_backward(ROW), pipe.optim_step()]
    for future in futures:
        future.result(timeout=120)


def worker_times(run: SignalRun) -> dict[str, Any]:
    """What the worker itself says: its own work, and the wait before it."""
    steps = [(run.forward_backward(ROW).timings, run.optim_step().timings) for _ in range(50)]
    return {
        f"{kind}_{part}": percentiles([float(getattr(pair[at], f"{part}_ms")) for pair in steps])
        for at, kind in enumerate(("forward_backward", "optim_step"))
        for part in ("execute", "queued")
    }


def in_process(model: Path) -> dict[str, Any]:
    """The bare loop in a process of its own."""
    say("the bare loop")
    command = [
        sys.executable,
        "-m",
        "tests.bench.bare",
        str(model),
        "--rows",
        "1",
        "--length",
        "32",
        "--steps",
        "300",
    ]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
