"""The tiny model's base, storage in a folder, and states to store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.engine.support import make_rows, make_trainer
from workers.engine.base import Base, load_base
from workers.engine.trainer import Trainer
from workers.storage import LocalStorage


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> Base:
    """The tiny model in float32, on one thread."""
    return load_base(tiny_model, dtype="float32", threads=1)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """An empty local storage."""
    return LocalStorage(tmp_path / "store")


@pytest.fixture
def trained(base: Base) -> Callable[..., Trainer]:
    """Makes a run that has taken a step and accumulated once since."""

    def make(**options: object) -> Trainer:
        run = make_trainer(base, **options)  # type: ignore[arg-type]
        for seed in range(2):
            run.forward_backward(make_rows((9, 20), seed=seed), "causal_lm", {}, True)
            if seed == 0:
                run.optim_step()
        return run

    return make
