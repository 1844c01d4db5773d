"""A database with the pool's tables, in a temporary folder whose name has a space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import gpu_pool.tables  # noqa: F401 - registers the tables
from gpu_pool.database import Base, Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    folder = tmp_path / "data folder"
    folder.mkdir()
    opened = Database(f"sqlite:///{folder / 'signal.db'}")
    Base.metadata.create_all(opened.engine)
    yield opened
    opened.close()
