"""Runs that share a worker: what sharing costs, and what it saves.

`python -m tests.bench.sharing [--model FOLDER] [--steps N]` prints one JSON object; progress goes to stderr.
Sessions in this process, on a real journal, that take turns as in a worker, with adapters of rank 16.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from tests.bench.__main__ import machine
from tests.bench.timing import say
from tests.support.sessions import CONFIG, Together, step
from tests.support.tiny import make_tiny_model
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.queue.journal import Journal, connect
from workers.queue.records import NewEntry
from workers.session.session import Session
from workers.storage import LocalStorage

RUNS = [f"run_{number:016x}" for number in range(8)]
SHAPE = {**CONFIG, "lora_r": 16}
ROUNDS = 3


class Bench:
    """One server and one model; every worker starts from nothing."""

    def __init__(self, folder: Path, valkey: Valkey, model: Path) -> None:
        """Loads nothing yet."""
        self._folder, self._valkey, self._model = folder, valkey, model
        self._redis, self._count = connect(valkey.url), 0

    @contextmanager
    def worker(self) -> Iterator[Together]:
        """A worker without runs, with its base loaded."""
        self._redis.flushall()
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        settings = settings_for(folder, self._valkey.url, snapshot_share=1e-9)
        worker = Together(Journal(self._redis, LocalStorage(folder / "s"), settings), self._model)
        attach(worker, "run_ffffffffffffffff")
        worker.rota.leave("run_ffffffffffffffff")
        yield worker
        worker.rota.sessions.clear()
        gc.collect()


def attach(worker: Together, run_id: str) -> Session:
    """A new run on a worker."""
    worker.journal.open_run(run_id, "user_1")
    return worker.attach(run_id, 1, config={**SHAPE, "seed": int(run_id[-4:], 16)})


def rows(count: int, length: int, seed: int = 0) -> NewEntry:
    """A forward_backward of so many rows of so many random tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 500, count * length).astype("<i4")
    packed = {
        "lengths": [length] * count,
        "tokens": tokens.tobytes(),
        "targets": np.roll(tokens, -1).tobytes(),
        "weights": np.ones(count * length, "<f4").tobytes(),
    }
    body = {"loss_fn": "causal_lm", "loss_kwargs": {}, "accumulate": False, "rows": packed}
    return NewEntry("forward_backward", msgpack.packb(body), tokens=count * length)


def steps(count: int) -> list[NewEntry]:
    """A loop of 4 rows of 64 tokens."""
    return [entry for number in range(count) for entry in (rows(4, 64, number), step())]


def seconds_of_steps(worker: Together, runs: Sequence[str], count: int) -> float:
    """Of so many steps of each of these runs, which are there already."""
    for run_id in runs:
        worker.journal.append(run_id, steps(count))
    begun = time.perf_counter()
    for run_id in runs:
        worker.rota.serve(run_id)
    return time.perf_counter() - begun


def step_time(bench: Bench, count: int) -> dict[str, float]:
    """8 runs in turns against each of them by itself: milliseconds per step, the best of some rounds."""
    alone, together = [], []
    for _ in range(ROUNDS):
        with bench.worker() as worker:
            total = 0.0
            for run_id in RUNS:
                attach(worker, run_id)
                seconds_of_steps(worker, [run_id], 2)
                total += seconds_of_steps(worker, [run_id], count)
                worker.rota.leave(run_id)
            alone.append(total)
        with bench.worker() as worker:
            for run_id in RUNS:
                attach(worker, run_id)
            seconds_of_steps(worker, RUNS, 2)
            together.append(seconds_of_steps(worker, RUNS, count))
    each = 1e3 / (count * len(RUNS))
    return {
        "alone_ms": round(min(alone) * each, 3),
        "together_ms": round(min(together) * each, 3),
        "ratio": round(min(together) / min(alone), 3),
    }


def memory_per_run(bench: Bench) -> dict[str, float]:
    """Megabytes by which a further run makes the process grow, once it has stepped and accumulated."""
    plan = [rows(4, 64), step(), rows(4, 64)]
    with bench.worker() as worker:
        held = []
        for run_id in RUNS:
            session = attach(worker, run_id)
            worker.journal.append(run_id, plan)
            worker.rota.serve(run_id)
            gc.collect()
            held.append(_resident_mb())
        numbers = session.trainer.num_trainable_parameters
    own = numbers * (4 + 8 + 4) / 1e6  # master, moments, accumulated
    return {"mb": round((held[-1] - held[0]) / (len(RUNS) - 1), 2), "state_mb": round(own, 2)}


def ready_time(bench: Bench) -> dict[str, float]:
    """Milliseconds until a run on a loaded base is ready."""
    with bench.worker() as worker:
        found = []
        for run_id in RUNS:
            begun = time.perf_counter()
            attach(worker, run_id)
            found.append((time.perf_counter() - begun) * 1e3)
    return {"median_ms": round(sorted(found)[len(found) // 2], 2), "most_ms": round(max(found), 2)}


def delay_of_small(bench: Bench, large: int, times: int) -> dict[str, float]:
    """From sending a forward_backward of 32 tokens to its commit, while another run trains batches of `large`
    rows of 128 tokens without a break."""
    big, small = RUNS[:2]
    with bench.worker() as worker:
        journal = worker.journal
        for run_id in (big, small):
            attach(worker, run_id)
        journal.append(big, [rows(large, 128)])
        begun = time.perf_counter()
        worker.rota.serve(big)
        whole = time.perf_counter() - begun
        (past,) = journal.past(big, 0, 1)
        batches = len(past.record["plan"]["batches"])
        enough = threading.Event()

        def submit() -> None:
            own = Journal(connect(journal.settings.redis_url), journal.storage, journal.settings)
            for _ in range(times):
                own.append(small, [rows(1, 32)])
                time.sleep(0.73 * whole / batches)
            enough.set()

        sender = threading.Thread(target=submit)
        sender.start()
        while not enough.is_set():
            journal.append(big, [rows(large, 128)])
            worker.rota.serve(big)
        sender.join()
        worker.rota.serve(small)
        waited = sorted(one.finished_at - one.submitted_at for one in journal.past(small, 0, times))
    return {
        "large_operation_ms": round(whole * 1e3, 1),
        "micro_batches": batches,
        "micro_batch_ms": round(whole / batches * 1e3, 1),
        "p50_ms": round(waited[len(waited) // 2] * 1e3, 1),
        "p95_ms": round(waited[len(waited) * 95 // 100] * 1e3, 1),
    }


def _resident_mb() -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """All figures of one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; without it a small random one")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run per round")
    parser.add_argument("--large", type=int, default=256, help="rows of the large batches")
    parser.add_argument("--small", type=int, default=40, help="small operations beside them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="signal-bench-") as name:
        folder = Path(name)
        model = args.model or make_tiny_model(folder / "model", hidden=256, layers=4)
        with running_valkey(folder) as valkey:
            bench, found = Bench(folder, valkey, model), {"machine": machine()}
            measures: dict[str, Any] = {
                "ready": lambda: ready_time(bench),
                "memory_per_run": lambda: memory_per_run(bench),
                "step": lambda: step_time(bench, args.steps),
                "small_beside_large": lambda: delay_of_small(bench, args.large, args.small),
            }
            for what, measure in measures.items():
                say(f"  {what}")
                found[what] = measure()
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
