"""The Celery tasks of a worker: three-line shims over `Host`.

A primitive's task carries its name and place for Flower; what it does is look at the journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery import Celery

from workers.queue.app import WAKE
from workers.queue.records import KINDS
from workers.settings import Settings


def register(app: Celery, settings: Settings) -> None:
    """Define the tasks on `app`. The host is made by the first task, in the child."""
    hosts: dict[int, Any] = {}

    def host() -> Any:
        pid = os.getpid()
        if pid not in hosts:
            from workers.session.host import Host

            hosts[pid] = Host(settings, app, os.environ["SIGNAL_NODE"])
        return hosts[pid]

    def doorbell(run_id: str, entry: int = 0) -> None:
        host().drain(run_id, entry)

    def hello() -> None:
        host()

    def warm() -> None:
        host().warm()

    def attach(run_id: str, epoch: int, spec: dict[str, Any]) -> None:
        host().attach(run_id, epoch, spec)

    def detach(run_id: str) -> None:
        host().detach(run_id)

    bodies: dict[str, Callable[..., None]] = dict.fromkeys((*KINDS, WAKE), doorbell)
    bodies |= {"hello": hello, "warm": warm, "attach": attach, "detach": detach}
    for name, body in bodies.items():
        app.task(name=name)(body)
