"""The tiny model and bases of it, built once per test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny import make_tiny_model
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base, load_base
from workers.engine.trainer import Trainer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def base(tiny: Path) -> Base:
    """The tiny model in float32, on one thread."""
    return load_base(tiny, dtype="float32", threads=1)


@pytest.fixture(scope="session")
def base64(tiny: Path) -> Base:
    """The tiny model in float64."""
    return load_base(tiny, dtype="float64", threads=1)


@pytest.fixture
def trainer(base: Base) -> Callable[..., Trainer]:
    """Makes a run on the float32 base whose adapter already does something."""
    return lambda **options: make_trainer(base, **options)
