"""The history of the database's shape."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from gpu_pool.database import make_engine
from web import migrate
from web.db.metadata import METADATA


def test_the_migrations_make_exactly_the_tables_of_the_code(empty_database: Path) -> None:
    engine = make_engine(f"sqlite:///{empty_database}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        assert {"runs", "users", "leases", "hosts"} <= set(inspect(connection).get_table_names())
    engine.dispose()


def test_several_at_once_upgrade_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a b.db'}"
    failures: list[Exception] = []

    def one() -> None:
        try:
            migrate.upgrade(url)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    migrate.upgrade(url)
