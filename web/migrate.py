"""Brings the database to the newest shape: `python -P -m web.migrate`, or `upgrade(url)`.

One at a time: SQLite's write lock or an advisory lock of PostgreSQL holds a second caller back, who then
finds nothing to do. The whole upgrade is one transaction.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from gpu_pool.database import make_engine
from workers.settings import Settings

_FOLDER = Path(__file__).parent / "db" / "migrations"
# Any number will do, as long as nothing else in the database takes it.
_LOCK = 0x5167_6E61


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database at `url`."""
    engine = make_engine(url)
    try:
        with engine.execution_options(signal_writes=True).connect() as connection:
            _relax(connection)
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
                command.upgrade(config(connection), revision)
    finally:
        engine.dispose()


def config(connection: Connection) -> Config:
    """alembic's configuration, without a file of its own."""
    out = Config()
    out.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    out.attributes["connection"] = connection
    return out


def _relax(connection: Connection) -> None:
    # Batches drop and remake tables; with foreign keys enforced, SQLite would delete rows that refer to
    # them. The setting belongs to this connection only, and must be made outside a transaction.
    if connection.dialect.name == "sqlite":
        raw = connection.connection.dbapi_connection
        assert raw is not None
        raw.execute("PRAGMA foreign_keys=OFF")


def main() -> None:
    """Upgrade the database that the environment names."""
    upgrade(Settings.from_env().database_url)


if __name__ == "__main__":
    main()
