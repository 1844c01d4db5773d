"""Runs `signal ARGUMENTS…` in this process, against scripted answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rewardsignal import cli
from rewardsignal._cli import options
from tests.unit.client.wire import RUN, Wire, reply

Signal = Callable[..., Result]

CREATED = "2026-11-23T12:00:00.000Z"
LISTED = {**RUN, "name": None, "created_at": CREATED}
SHOWN = {
    **LISTED, "queued": 0, "error": None, "device": None, "ended_at": None, "hold": None,
    "parent": None, "branchable": None, "next_seq": 4, "applied_seq": 3,
}  # fmt: skip
ACCOUNT = {"object": "user", "user_id": "user_1", "name": "ann", "key_id": "abc"}


class Runner:
    """The command, and the requests that it has sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.wire = Wire(reply({}))

    def __call__(self, *arguments: str, answers: list[Any] | None = None, **run: Any) -> Result:
        self.wire = Wire(*(answers or [reply({})]))
        self._patch.setattr(options, "SignalClient", self.wire.client)
        return CliRunner().invoke(cli.main, arguments, prog_name="signal", **run)

    @property
    def asked(self) -> list[str]:
        """What was asked of the server: methods and paths."""
        return [f"{one.method} {one.url.path}" for one in self.wire.requests]
