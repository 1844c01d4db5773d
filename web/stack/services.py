"""The processes of a stack: their commands, environments and signs of being ready.

Starts nothing itself. Every Python process runs with -P from an empty folder.
"""

from __future__ import annotations

import base64
import http.client
import sys
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from web.stack.children import Service
from web.stack.folder import Folder
from web.stack.redis_server import find_binary, serves, write_config

AGENT_GRACE_S = 35.0
# glibc would keep what large bodies took: an arena for every few threads, and a growing threshold
# above which memory is given back.
_LEAN_MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}


def redis(folder: Folder, environment: Mapping[str, str], port: int) -> Service:
    """The bundled Redis-protocol server."""
    url = environment["REDIS_URL"]
    return Service(
        "redis",
        (str(find_binary()), str(write_config(folder, port))),
        environment,
        lambda: serves(url),
        grace_s=10.0,
    )


def web(environment: Mapping[str, str], listener: Callable[[], int], base_url: str) -> Service:
    """gunicorn on a socket that the supervisor opened."""
    return Service(
        "web",
        python("gunicorn", "-c", "python:web.stack.gunicorn_conf", "web.wsgi:app"),
        {**environment, **_LEAN_MALLOC},
        lambda: answers(f"{base_url}/ready"),
        listener=listener,
        grace_s=5.0,
    )


def agent(environment: Mapping[str, str]) -> Service:
    """The pool's agent; before it ends its workers finish what runs and write snapshots."""
    return Service("agent", python("gpu_pool.agent"), environment, grace_s=AGENT_GRACE_S)


def projector(environment: Mapping[str, str]) -> Service:
    """Writes committed operations into SQL."""
    return Service("projector", python("web.projector"), environment, grace_s=5.0)


def flower(
    environment: Mapping[str, str], listener: Callable[[], int], login: str, url: str
) -> Service:
    """Celery's page for operators, behind a login, on a socket that the supervisor opened.

    Its options go by environment: no secret in arguments.
    """
    options = {
        "FLOWER_BASIC_AUTH": login,
        "FLOWER_MAX_TASKS": "10000",
        "FLOWER_PURGE_OFFLINE_WORKERS": "60",
    }
    return Service(
        "flower",
        # Operators can wait for its page; an operation must not wait for it.
        ("nice", "-n", "10", *python("web.stack.flower_page")),
        {**environment, **options},
        lambda: answers(f"{url}/healthcheck", login),
        listener=listener,
        grace_s=3.0,
    )


def prepare(environment: Mapping[str, str], arguments: tuple[str, ...]) -> Service:
    """Migrations, models and the first key: runs to its end before the others start."""
    return Service("prepare", python("web.stack.prepare", *arguments), environment)


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """A module run by this Python, which never looks for modules in the current folder."""
    return (sys.executable, "-P", "-m", module, *arguments)


def answers(url: str, login: str | None = None) -> bool:
    """Whether a GET is answered with 200; goes past any proxy."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    headers = {}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    try:
        connection.request("GET", parts.path, headers=headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
