"""The command `signal`: which commands there are, what they print, their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import click
import httpx2
import pytest
from click.testing import CliRunner, Result

import rewardsignal as rs
from rewardsignal import _commands, cli
from tests.unit.client.wire import RUN, Wire, refusal, reply

LISTED = {**RUN, "name": None, "created_at": "2026-11-23T12:00:00.000Z"}
SHOWN = {**LISTED, "queued": 0, "error": None, "device": None, "ended_at": None}
MODEL = {"name": "tiny", "architecture": "Llama", "num_parameters": 1234567, "context_length": 512}

Signal = Callable[..., Result]


@pytest.fixture
def signal(monkeypatch: pytest.MonkeyPatch) -> Signal:
    """Runs `signal ARGUMENTS…` against scripted answers."""

    def run(*arguments: str, answers: list[Any] | None = None) -> Result:
        wire = Wire(*(answers or [reply({})]))
        monkeypatch.setattr(_commands, "SignalClient", wire.client)
        return CliRunner().invoke(cli.main, arguments, prog_name="signal")

    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """The installed commands; the client's own until the test adds some."""
    own = {"runs": "rewardsignal._commands:runs", "models": "rewardsignal._commands:models"}
    entries = {name: EntryPoint(name, value, cli.GROUP) for name, value in own.items()}
    monkeypatch.setattr(cli, "_installed", lambda: entries)
    return entries


def test_version(signal: Signal) -> None:
    assert signal("--version").output == f"signal, version {rs.__version__}\n"


def test_own_commands_are_registered() -> None:
    assert {"models", "runs"} <= cli._installed().keys()


def test_help_lists_what_is_installed(signal: Signal, installed: dict[str, EntryPoint]) -> None:
    output = signal("--help").output
    assert "models" in output
    assert "doctor" not in output


@pytest.mark.parametrize("command", cli.SERVER_COMMANDS)
def test_server_commands_say_what_brings_them(
    signal: Signal, installed: dict[str, EntryPoint], command: str
) -> None:
    result = signal(command, "--detach", "x")
    assert result.exit_code == 1
    assert "signal-server" in result.stderr


def test_commands_of_other_distributions(
    signal: Signal, installed: dict[str, EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cli, "hello", click.Command("hello", callback=lambda: click.echo("hi")), raising=False
    )
    installed["hello"] = EntryPoint("hello", "rewardsignal.cli:hello", cli.GROUP)
    assert signal("hello").output == "hi\n"


def test_a_command_that_cannot_be_loaded_hinders_no_other(
    signal: Signal, installed: dict[str, EntryPoint]
) -> None:
    installed["broken"] = EntryPoint("broken", "no_such_module:command", cli.GROUP)
    assert signal("--help").exit_code == 0
    assert "no_such_module" in signal("broken").stderr
    assert signal("models", answers=[reply({"models": [], "data": []})]).exit_code == 0


def test_runs_list(signal: Signal) -> None:
    answer = reply({"data": [LISTED], "has_more": False, "next_cursor": None})
    output = signal("runs", "list", answers=[answer]).output
    assert output.splitlines()[0].split() == ["RUN", "NAME", "MODEL", "STATUS", "STEP", "CREATED"]
    assert str(RUN["run_id"]) in output


def test_runs_list_ends_at_its_limit(signal: Signal) -> None:
    answer = reply({"data": [LISTED, LISTED], "has_more": True, "next_cursor": "c"})
    result = signal("runs", "list", "--limit", "3", "--json", answers=[answer])
    assert len(json.loads(result.output)) == 3


def test_runs_show(signal: Signal) -> None:
    saved = {"name": "final", "size_bytes": 12345, "files": []}
    result = signal("runs", "show", "run_1", answers=[reply(SHOWN), reply({"data": [saved]})])
    assert "config lora_r" in result.output
    assert "12,345 bytes" in result.output


def test_runs_show_json(signal: Signal) -> None:
    result = signal("runs", "show", "run_1", "--json", answers=[reply(SHOWN), reply({"data": []})])
    assert json.loads(result.output)["run_id"] == RUN["run_id"]


def test_runs_watch(signal: Signal) -> None:
    lost = {"id": 3, "type": "worker_lost", "at": "2026-01-02T03:04:05.000Z",
            "data": {"why": "killed", "running_seq": None, "more": {}}}  # fmt: skip
    page = reply({"data": [lost], "has_more": False, "next_after": 3, "ended": True})
    output = signal("runs", "watch", "run_1", answers=[reply(SHOWN), page]).output
    assert output.split() == ["2026-01-02T03:04:05.000Z", "worker", "lost", "why", "killed"]
    output = signal("runs", "watch", "run_1", "--json", answers=[reply(SHOWN), page]).output
    assert json.loads(output) == lost


def test_models(signal: Signal) -> None:
    answer = reply({"models": ["tiny"], "data": [MODEL]})
    assert "1,234,567" in signal("models", answers=[answer]).output
    assert json.loads(signal("models", "--json", answers=[answer]).output)[0]["name"] == "tiny"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (refusal(401, "unauthorized"), 3),
        (refusal(403, "forbidden"), 3),
        (refusal(404, "not_found"), 4),
        (refusal(409, "run_closed"), 5),
        (refusal(503, "unavailable"), 5),
        (refusal(500, "internal_error"), 1),
        (httpx2.UnsupportedProtocol("x"), 5),
    ],
)
def test_exit_codes(
    signal: Signal, answer: Any, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardsignal._transport.UNSEEN_RETRY_S", 0.0)
    result = signal("runs", "show", "run_1", answers=[answer])
    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")


def test_every_wrong_field_is_told(signal: Signal) -> None:
    wrong = [{"param": name, "code": "validation_error", "message": f"bad {name}"} for name in "ab"]
    result = signal("models", answers=[refusal(422, "validation_error", details=wrong)])
    assert "b: bad b" in result.stderr


def test_wrong_usage(signal: Signal) -> None:
    assert signal("runs", "show").exit_code == 2
    assert signal("nothing").exit_code == 2


def test_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNAL_API_KEY", raising=False)
    assert CliRunner().invoke(cli.main, ["models"]).exit_code == 3
