"""The web tier without sockets: SQLite in a temporary folder, and a Redis address that is never asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from gpu_pool.database import Database
from tests.support.tiny import make_tiny_model
from web import create_app, migrate
from web.accounts.service import create_key
from workers.catalogue import Catalogue
from workers.settings import Settings


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("database") / "signal.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a context of 256 and a vocabulary of 512."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=256)


@pytest.fixture
def settings(tmp_path: Path, empty_database: Path) -> Settings:
    """Settings over a fresh data folder."""
    return _settings(tmp_path, empty_database)


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    """A fresh database."""
    with closing(Database(settings.database_url)) as database:
        yield database


@pytest.fixture(scope="session")
def app(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, tiny_model: Path
) -> Iterator[Flask]:
    """One application for all tests, with the model "tiny" and a limit of 1,000 bytes for bodies."""
    settings = _settings(tmp_path_factory.mktemp("app"), empty_database)
    Catalogue(settings).add("tiny", tiny_model)
    application = create_app(settings)
    yield application
    application.extensions["signal"].close()


@pytest.fixture(scope="session")
def api_key(app: Flask) -> str:
    """A key of the user ann."""
    return create_key(app.extensions["signal"].db, "ann")[1]


@pytest.fixture
def client(app: Flask, api_key: str) -> FlaskClient:
    """A client that sends ann's key."""
    found = app.test_client()
    found.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {api_key}"
    return found


def _settings(folder: Path, database: Path) -> Settings:
    shutil.copy(database, folder / "signal.db")
    return Settings(
        data_dir=folder,
        redis_url="redis://127.0.0.1:1/0",
        database_url=f"sqlite:///{folder / 'signal.db'}",
        secret="a secret of the tests",
        models_file=folder / "models.json",
        max_body_bytes=1000,
    )
