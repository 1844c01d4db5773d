"""Keys for the operator of this machine, made straight in the data folder's database.

Works whether the stack runs or not: the web processes look into the same database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime

from gpu_pool.database import Database
from web.accounts import service
from web.stack import environment, state
from web.stack.errors import StackError
from web.stack.folder import Folder, write_private
from workers.settings import Settings

FIRST_USER = "local"


def create_key(folder: Folder, user: str) -> str:
    """A new key for the user, who is made when there is none."""
    with _database(folder) as db:
        try:
            return service.create_key(db, user)[1]
        except ValueError as error:
            raise StackError(f"--user: {error}") from None


def list_keys(folder: Folder) -> list[dict[str, str | None]]:
    """All keys, oldest first, without what would open anything."""
    with _database(folder) as db:
        found = service.list_keys(db)
    return [
        {
            "key_id": key.id,
            "user": key.user,
            "created_at": _time(key.created_at),
            "last_used_at": _time(key.last_used_at),
            "revoked_at": _time(key.revoked_at),
        }
        for key in found
    ]


def revoke_key(folder: Folder, key_id: str) -> None:
    """Make a key useless, within ten seconds where the stack runs. Raises StackError if unknown."""
    with _database(folder) as db:
        if not service.revoke_key(db, key_id):
            raise StackError(f"there is no key {key_id}; `signal keys list` names them")


def _time(at: datetime | None) -> str | None:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z") if at else None


@contextmanager
def _database(folder: Folder) -> Iterator[Database]:
    """The data folder's database, with its tables."""
    folder.prepare()
    settings = settings_of(folder)
    if state.read(folder) is None:
        # A stack that runs has done this; alembic takes a while to import.
        from web import migrate

        migrate.upgrade(settings.database_url)
    with closing(Database(settings.database_url)) as db:
        yield db


def ensure_first_key(folder: Folder, db: Database) -> None:
    """Keeps one valid key of the first user in the data folder, so that `up` can print it every time."""
    try:
        if service.user_of_key(db, folder.api_key.read_text().strip()):
            return
    except FileNotFoundError:
        pass
    write_private(folder.api_key, service.create_key(db, FIRST_USER)[1] + "\n")


def settings_of(folder: Folder) -> Settings:
    """The settings of the stack that runs on the data folder, else those of this shell."""
    found = state.read(folder)
    env = environment.settings_of(environment.current())
    # Only a stack that runs knows the address of its own Redis server.
    env.setdefault("REDIS_URL", "redis://127.0.0.1:0/0")
    env |= found.environment if found else {}
    return Settings.from_env(env | {"SIGNAL_DATA_DIR": str(folder.root)})
