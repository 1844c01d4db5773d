"""Peak memory of one training step of 4 x 384 tokens in bfloat16, each variant in a process of its own.

`python -m tests.bench.engine_memory VARIANT MODEL` prints the megabytes by which the process grew beyond
what it held with the model loaded and the optimizer made.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench.engine_peers import Engine, Peer, Rows, random_rows

VARIANTS = ("naive", "engine", "checkpointed")
LENGTHS = (384,) * 4


def peaks(model: Path) -> dict[str, float]:
    """Megabytes by variant."""
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "tests.bench.engine_memory", variant, str(model)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = float(done.stdout.split()[-1])
    return found


def main() -> int:
    """One variant."""
    import torch

    torch.set_num_threads(1)
    step = _variant(sys.argv[1], Path(sys.argv[2]))
    # Memory-mapped weights, moments and libraries are there after a short step.
    step(random_rows((16,)))
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    step(random_rows(LENGTHS))
    print(round(_memory("VmHWM") - before, 1))
    return 0


def _variant(variant: str, model: Path) -> Callable[[Rows], float]:
    if variant == "naive":
        return Peer(model, "bfloat16").padded
    return Engine(model, "bfloat16", checkpoint=variant == "checkpointed").step


def _memory(name: str) -> float:
    """Megabytes of the process now (VmRSS) or at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
