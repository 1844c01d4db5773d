"""A run worker's Celery application: `python -P -m celery -A workers.main:app worker …`.

Started by the pool's agent. Importing this is light: the parent process never loads torch.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from billiard import active_children
from celery.signals import worker_shutting_down

from workers.queue.app import make_app
from workers.session.tasks import register
from workers.settings import Settings

settings = Settings.from_env()
app = make_app(settings)
register(app, settings)


@worker_shutting_down.connect
def drain(**_: object) -> None:
    """SIGTERM, in the parent: the child leaves its runs in order, after the present operation."""
    for child in active_children():
        if child.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGUSR1)
