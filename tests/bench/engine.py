"""The training engine against plain transformers + peft on SmolLM2-135M: `make bench-engine`.

CPU seconds of one thread in one process, variants in turn so that a busy machine slows all of them; medians.
A step is forward, backward and AdamW of a LoRA of rank 8 on all linear layers. Two batches: 8 x 128
tokens, and 8 rows of 16 to 512, which padding makes 4.3 times as many. Peak memory is that of processes
of their own. Prints a table to stderr and JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.engine_memory import peaks
from tests.bench.engine_peers import Engine, Peer, random_rows

MODEL = Path(__file__).parents[2] / ".signal" / "models" / "smollm2-135m-instruct"
EQUAL = (128,) * 8
# 952 tokens, 4096 when padded.
MIXED = (16, 24, 32, 48, 64, 96, 160, 512)
Step = Callable[[], Any]


def main() -> int:
    """Runs it all; 0 when every aim is met."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, default=MODEL)
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "matmul_gflops": matmul_peaks()}
    found["steps"] = timings(args.model, args.repeats)
    found["peak_memory_mb"] = peaks(args.model)
    found["aims"] = aims(found)
    print(table(found), file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 0 if all(aim["met"] for aim in found["aims"]) else 1


def timings(model: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds of a step by batch and variant."""
    seconds: dict[str, dict[str, float]] = {}
    for name, lengths in (("8x128", EQUAL), ("mixed", MIXED)):
        rows = random_rows(lengths)
        steps: dict[str, Step] = {}
        for dtype in ("float32", "bfloat16"):
            peer = Peer(model, dtype)
            steps[f"padded {dtype}"] = partial(peer.padded, rows)
            if name == "mixed" and dtype == "bfloat16":
                steps["packed bfloat16"] = partial(peer.packed, rows)
            steps[f"engine {dtype}"] = partial(Engine(model, dtype).step, rows)
        seconds[name] = _medians(steps, repeats)
    return seconds


def _medians(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        # The padded loop takes half a minute: its first pass is no slower than the rest.
        if not name.startswith("padded"):
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            taken[name].append(time.process_time() - begun)
            print(f"{name}: {taken[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


def matmul_peaks() -> dict[str, float]:
    """GFLOP/s of the best of a few products of the sizes that matter, by number format."""
    return {
        name: round(max(_gflops(getattr(torch, name), *shape) for shape in _SHAPES), 1)
        for name in ("float32", "bfloat16")
    }


_SHAPES = ((2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576))


def _gflops(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    first, second = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    best = float("inf")
    for _ in range(8):
        begun = time.process_time()
        torch.mm(first, second)
        best = min(best, time.process_time() - begun)
    return 2e-9 * rows * inner * columns / best


def aims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether it was."""
    equal, mixed, memory = found["steps"]["8x128"], found["steps"]["mixed"], found["peak_memory_mb"]
    engine = "engine bfloat16"
    rows = (
        ("8x128: times the padded float32 loop", 1.7, equal["padded float32"] / equal[engine]),
        ("mixed: times the padded bfloat16 loop", 5.5, mixed["padded bfloat16"] / mixed[engine]),
        ("mixed: times packed bfloat16", 1.3, mixed["packed bfloat16"] / mixed[engine]),
        (
            "memory: the naive loop's, with checkpointing",
            3.0,
            memory["naive"] / memory["checkpointed"],
        ),
    )
    return [
        {"aim": name, "at_least": least, "found": round(value, 2), "met": value >= least}
        for name, least, value in rows
    ]


def table(found: dict[str, Any]) -> str:
    """The same for eyes. The rate counts 4 operations per parameter and real token, without attention."""
    lines = [
        f"{'batch':8} {'variant':18} {'CPU s':>8} {'tokens/s':>9} {'GFLOP/s':>8} {'of peak':>8}"
    ]
    for name, lengths in (("8x128", EQUAL), ("mixed", MIXED)):
        for variant, seconds in found["steps"][name].items():
            rate = sum(lengths) / seconds
            gflops = 4 * _PARAMETERS * rate * 1e-9
            share = gflops / found["matmul_gflops"][variant.split()[-1]]
            lines.append(
                f"{name:8} {variant:18} {seconds:8.2f} {rate:9.0f} {gflops:8.1f} {share:8.0%}"
            )
    lines.append("")
    lines += [f"peak memory, {name}: {mb:.0f} MB" for name, mb in found["peak_memory_mb"].items()]
    lines.append("")
    for aim in found["aims"]:
        mark = "met" if aim["met"] else "MISSED"
        lines.append(f"{aim['aim']}: {aim['found']} (aim {aim['at_least']}) {mark}")
    return "\n".join(lines)


_PARAMETERS = 134.5e6


if __name__ == "__main__":
    raise SystemExit(main())
