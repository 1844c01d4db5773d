"""Rows and runs for the engine's tests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.text.rows import Row

VOCAB = 512


def make_row(
    length: int, seed: int = 0, weights: Sequence[float] | None = None, low: int = 4
) -> Row:
    """A row of random tokens with the next token as target; weight 1 everywhere by default."""
    ids = np.random.default_rng(seed).integers(low, VOCAB, length + 1).astype(np.int32)
    chosen = np.ones(length, np.float32) if weights is None else np.asarray(weights, np.float32)
    return Row(
        array("i", ids[:-1].tobytes()),
        array("i", ids[1:].tobytes()),
        array("f", chosen.tobytes()),
    )


def make_rows(lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Rows of these lengths, weighted by values that differ, some of them 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], length)
        weights[-1] = 1.0
        rows.append(make_row(length, seed * 1000 + number, weights.tolist()))
    return rows


def make_trainer(
    base: Base,
    *,
    seed: int = 1,
    r: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] | None = None,
    adamw: AdamWSettings | None = None,
    noise: float = 0.05,
    gradient_checkpointing: bool = False,
) -> Trainer:
    """A run whose B matrices are not zero, so that every gradient and every output depends on all of it."""
    trainer = Trainer(
        base,
        LoraSpec(r=r, alpha=alpha, target_modules=targets, seed=seed),
        adamw or AdamWSettings(learning_rate=1e-2),
        gradient_checkpointing=gradient_checkpointing,
    )
    generator = torch.Generator().manual_seed(seed)
    master = trainer.adapter.master
    master += (noise * torch.randn(master.shape, generator=generator, dtype=torch.float64)).to(
        master
    )
    trainer.adapter.renew()
    return trainer


def gradient(trainer: Trainer) -> torch.Tensor:
    """A copy of the accumulated sum of gradients [P]."""
    assert trainer._accumulation is not None
    return trainer._accumulation.gradient.clone()


def state(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all that a step changes."""
    optimizer = trainer.optimizer
    parts = [trainer.adapter.master, optimizer.exp_avg, optimizer.exp_avg_sq]
    if trainer.accumulated:
        parts.append(gradient(trainer))
    return [part.clone() for part in parts]


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
