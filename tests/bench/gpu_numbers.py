"""What must hold on a GPU: gradients near those of float64 on the CPU, for each kernel and number format."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.engine_peers import random_rows
from tests.bench.gpu_models import SHAPES, write_model
from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.text.rows import Row

# Small enough for float64 on a CPU, with the head sizes and grouping of the large ones.
SMALL = {
    **SHAPES["1B"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
LENGTHS = (300, 64, 64, 17, 1)
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def check_numbers(device: str = "cuda") -> list[dict[str, Any]]:
    """Relative distances of gradients, each with its limit and whether it holds."""
    with tempfile.TemporaryDirectory(prefix="signal-gpu-") as folder:
        path = write_model(SMALL, Path(folder), device)
        return [
            {"check": name, "found": found, "limit": limit, "holds": found <= limit}
            for name, found, limit in _checks(path, device)
        ]


def _checks(path: Path, device: str) -> Iterator[tuple[str, float, float]]:
    exact = _gradient(path, "float64", "cpu")
    for dtype, limit in LIMITS.items():
        found = _gradient(path, dtype, device)
        yield f"{dtype} gradient", _distance(found, exact), limit
        again = _gradient(path, dtype, device, checkpoint=True)
        yield f"{dtype} gradient, recomputed layers", _distance(again, exact), limit
        apart = _gradient(path, dtype, device, tokens=300)
        yield f"{dtype} gradient, in micro-batches", _distance(apart, exact), limit
    other = _gradient(path, "float32", device, own=False)
    yield "float32 gradient, transformers' layers", _distance(other, exact), LIMITS["float32"]
    dropped = [_gradient(path, "float32", device, dropout=0.1, tokens=n) for n in (4096, 300)]
    yield "dropout in micro-batches", _distance(*dropped), LIMITS["float32"]


def _gradient(
    path: Path,
    dtype: str,
    device: str,
    *,
    checkpoint: bool = False,
    own: bool = True,
    dropout: float = 0.0,
    tokens: int = 4096,
) -> Tensor:
    base = load_base(path, dtype=dtype, device=device, own=own)
    spec = LoraSpec(r=8, alpha=16.0, dropout=dropout)
    run = Trainer(base, spec, AdamWSettings(), gradient_checkpointing=checkpoint)
    run.budget.ceiling = tokens
    noise = torch.randn(run.adapter.master.shape, generator=torch.Generator().manual_seed(1))
    run.adapter.master += (0.02 * noise).to(run.adapter.master)
    run.adapter.renew()
    rows = [
        Row(array("i", row[:-1]), array("i", row[1:]), array("f", [1.0] * (len(row) - 1)))
        for row in random_rows(LENGTHS, SMALL["vocab_size"])
    ]
    run.forward_backward(rows, "causal_lm", {}, seq=1)
    return run.capture().tensors["gradient"].double()


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
