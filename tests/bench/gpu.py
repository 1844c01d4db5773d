"""The engine on a GPU: its numbers against float64 on the CPU, its speed against transformers + peft.

`make gpu-check`. Speed is that of a LoRA step (forward and backward, rank 16 on all linear layers) on 1B
and 8B Llama shapes with random weights, 2048 tokens packed in bfloat16. Utilisation counts 4 N operations per
token and the attention products, without recomputation, over the matmul peak measured in the same run. And
sampling (`gpu_sampling`).
Without a GPU it says so and ends with 2.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.engine_peers import Engine, Peer, Rows, random_rows
from tests.bench.gpu_models import SHAPES, write_model
from tests.bench.gpu_numbers import check_numbers
from tests.bench.gpu_sampling import AIMS, check_sampling, decoding

LENGTHS = (1024, 512, 256, 128, 64, 64)
WARM, MEASURED = 3, 8
AIM = 0.45


def main() -> int:
    """Prints a table to stderr and JSON to stdout; 0 when all numbers hold and the aim is met."""
    if not torch.cuda.is_available():
        print(
            "make gpu-check: torch finds no CUDA device here; nothing was checked.", file=sys.stderr
        )
        return 2
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matmul_tflops": round(matmul_peak(), 1),
        "numbers": [*check_numbers(), *check_sampling()],
    }
    found["speed"] = [line for name in SHAPES for line in speeds(name, found["matmul_tflops"])]
    found["decoding"] = decoding("8B")
    print(table(found), file=sys.stderr)
    print(json.dumps(found, indent=2))
    engine = [line["mfu"] for line in found["speed"] if line["variant"] == "engine"]
    reached = bool(engine) and engine[-1] >= AIM
    reached &= all(found["decoding"][name] >= aim for name, aim in AIMS.items())
    return 0 if reached and all(one["holds"] for one in found["numbers"]) else 1


def matmul_peak() -> float:
    """TFLOP/s of bfloat16 products of 8192 x 8192."""
    first, second = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds = _seconds(lambda: torch.mm(first, second))
    return 2e-12 * 8192**3 / seconds


def speeds(name: str, peak: float) -> list[dict[str, Any]]:
    """Tokens per second, utilisation and peak memory of each variant of one shape."""
    lines: list[dict[str, Any]] = []
    rows = random_rows(LENGTHS, SHAPES[name]["vocab_size"])
    with tempfile.TemporaryDirectory(prefix="signal-gpu-") as folder:
        path = write_model(name, Path(folder))
        for variant, make in _variants(path).items():
            lines.append(_measured(name, variant, make, rows, peak))
    return lines


def _variants(path: Path) -> dict[str, Callable[[], Callable[[Rows], Any]]]:
    def engine(checkpoint: bool) -> Callable[[], Callable[[Rows], Any]]:
        return lambda: Engine(path, "bfloat16", checkpoint=checkpoint, device="cuda").step

    return {
        "engine": engine(False),
        "engine, checkpointed": engine(True),
        "padded HF+PEFT": lambda: Peer(path, "bfloat16", "cuda").padded,
        "packed HF+PEFT": lambda: Peer(path, "bfloat16", "cuda").packed,
    }


def _measured(
    name: str, variant: str, make: Callable[[], Callable[[Rows], Any]], rows: Rows, peak: float
) -> dict[str, Any]:
    line: dict[str, Any] = {"model": name, "variant": variant}
    try:
        step = make()
        torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(lambda: step(rows))
    except torch.OutOfMemoryError:
        return {**line, "out_of_memory": True, "mfu": 0.0}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    tokens = sum(LENGTHS)
    return {
        **line,
        "tokens_per_s": round(tokens / seconds),
        "mfu": round(operations(name) / seconds * 1e-12 / peak, 3),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def operations(name: str) -> float:
    """Floating-point operations of one step: no weight gradients of the base, causal attention half."""
    shape = SHAPES[name]
    attention = sum(
        # Two products forward, four backward, of 2 operations each, over half of the square.
        6 * length * length * shape["hidden_size"] * shape["num_hidden_layers"]
        for length in LENGTHS
    )
    return 4.0 * parameters(name) * sum(LENGTHS) + attention


def parameters(name: str) -> int:
    """Numbers in the matrices that every token is multiplied by: layers and output, not the embedding."""
    shape = SHAPES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return int(shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])


def _seconds(call: Callable[[], Any]) -> float:
    """The best of a few, synchronised; the first ones choose kernels and measure memory."""
    best = float("inf")
    for number in range(WARM + MEASURED):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if number >= WARM:
            best = min(best, time.perf_counter() - begun)
    return best


def table(found: dict[str, Any]) -> str:
    """The same for eyes."""
    lines = [
        f"{found['device']}, torch {found['torch']}, {found['matmul_tflops']} TFLOP/s bfloat16",
        "",
    ]
    for one in found["numbers"]:
        mark = "holds" if one["holds"] else "DOES NOT HOLD"
        lines.append(f"{one['check']}: {one['found']:.2e} (at most {one['limit']:.0e}) {mark}")
    lines += ["", f"{'model':6} {'variant':22} {'tokens/s':>9} {'MFU':>6} {'peak GB':>8}"]
    for line in found["speed"]:
        if line.get("out_of_memory"):
            lines.append(f"{line['model']:6} {line['variant']:22} out of memory")
            continue
        lines.append(
            f"{line['model']:6} {line['variant']:22} {line['tokens_per_s']:9} {line['mfu']:6.1%} "
            f"{line['peak_memory_gb']:8}"
        )
    lines += ["", "decoding on 8B"]
    for name, value in found["decoding"].items():
        aim = f" (aim {AIMS[name]})" if name in AIMS else ""
        lines.append(f"{name:26} {value:>10}{aim}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
