"""Flower, Celery's page for operators, with all of it behind the login: `python -P -m web.stack.flower_page`.

Its options come by FLOWER_* variables. Needs the broker alone, so no task and no worker code is imported.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import flower.app
from flower.views import monitor
from tornado.web import authenticated

from workers.queue.app import make_app
from workers.settings import Settings


def main() -> None:
    """Serves until SIGTERM."""
    # Flower leaves these two open; others on this machine could read from them what is trained here.
    for page in (monitor.Metrics, monitor.Healthcheck):
        page.get = authenticated(page.get)
    flower.app.bind_sockets = _inherited
    make_app(Settings.from_env()).start(["flower"])


def _inherited(*_: Any, **__: Any) -> list[socket.socket]:
    """The supervisor's socket: no other program can take the port between its choice and its use."""
    listener = socket.socket(fileno=int(os.environ["SIGNAL_LISTENER_FD"]))
    listener.setblocking(False)
    return [listener]


if __name__ == "__main__":
    main()
