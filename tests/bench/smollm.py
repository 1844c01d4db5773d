"""A real model: SmolLM2-135M, 8 x 128 tokens, through the stack and in one bare process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rewardsignal import SignalRun
from tests.bench.timing import percentiles, running, say

MODEL = Path(".signal/models/smollm2-135m-instruct")
ROWS = [{"tokens": list(range(4, 132))}] * 8
STEPS = 8


def measure() -> dict[str, Any]:
    """Seconds per step of both, their ratio, and what the service adds to one operation."""
    if not MODEL.is_dir():
        return {"skipped": f"{MODEL} is not there: run `make model` first"}
    bare = bare_loop()
    with running("smollm2", MODEL, "cpu:1x2") as (_, client):
        served = served_loop(client.create_run("smollm2", lora_r=8))
    again = bare_loop()
    before = (1 / bare["steps_per_s"] + 1 / again["steps_per_s"]) / 2
    return {
        "bare_step_s": round(before, 3),
        "served_step_s": served["step_s"],
        "served_over_bare": round(served["step_s"] / before, 3),
        "submit_to_result_minus_worker_ms": served["overhead_ms"],
        "tokens_per_s": round(8 * 128 / served["step_s"], 1),
    }


def served_loop(run: SignalRun) -> dict[str, Any]:
    """One step after the other through the stack."""
    say("  the loop through the stack")
    run.forward_backward(ROWS)
    run.optim_step()
    overhead, started = [], time.perf_counter()
    for _ in range(STEPS):
        begun = time.perf_counter()
        result = run.forward_backward(ROWS)
        overhead.append((time.perf_counter() - begun) * 1e3 - result.timings.execute_ms)
        run.optim_step()
    step_s = (time.perf_counter() - started) / STEPS
    run.complete(save=False)
    return {"step_s": round(step_s, 3), "overhead_ms": percentiles(overhead)}


def bare_loop() -> dict[str, Any]:
    """The same engine in one process."""
    say("  the bare loop")
    options = ["--rows", "8", "--length", "128", "--steps", str(STEPS), "--threads", "2"]
    command = [sys.executable, "-m", "tests.bench.bare", str(MODEL), *options]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
