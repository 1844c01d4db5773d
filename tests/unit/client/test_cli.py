"""The command `signal`: which commands there are, how it ends, what it says of errors."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
from click.testing import CliRunner

import rewardsignal as rs
from rewardsignal import cli
from tests.unit.client.cli import Runner
from tests.unit.client.wire import refusal, reply

CLIENT = Path(__file__).parents[3] / "client_lib"
OWN = ("chat", "checkpoints", "completion", "login", "logout", "models", "runs", "sample", "train",
       "use", "whoami")  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """The installed commands; the client's own until the test adds some."""
    entries = {
        name: EntryPoint(name, value, cli.GROUP)
        for name, value in {
            "runs": "rewardsignal._cli.runs:runs",
            "models": "rewardsignal._cli.models:models",
        }.items()
    }
    monkeypatch.setattr(cli, "_installed", lambda: entries)
    return entries


def test_version(signal: Runner) -> None:
    assert signal("--version").output == f"signal, version {rs.__version__}\n"


def test_own_commands_are_declared_and_can_be_loaded() -> None:
    declared = (CLIENT / "setup.cfg").read_text().split("rewardsignal.commands =\n")[1]
    values = dict(line.strip().split(" = ") for line in declared.splitlines() if " = " in line)
    assert tuple(sorted(values)) == OWN
    for name, value in values.items():
        command = EntryPoint(name, value, cli.GROUP).load()
        assert isinstance(command, click.Command)
        assert command.name == name


def test_help_lists_what_is_installed(signal: Runner, installed: dict[str, EntryPoint]) -> None:
    output = signal("--help").output
    assert "models" in output
    assert "doctor" not in output


def test_help_says_what_the_exit_codes_mean(signal: Runner) -> None:
    output = signal("--help").output
    for code in (0, 1, 2, 3, 4, 5, cli.INTERRUPTED, cli.PIPE_CLOSED):
        assert f"\n    {code} " in output


@pytest.mark.parametrize("command", cli.SERVER_COMMANDS)
def test_server_commands_say_what_brings_them(
    signal: Runner, installed: dict[str, EntryPoint], command: str
) -> None:
    result = signal(command, "--detach", "x")
    assert result.exit_code == 1
    assert "signal-server" in result.stderr


def test_commands_of_other_distributions(
    signal: Runner, installed: dict[str, EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cli, "hello", click.Command("hello", callback=lambda: click.echo("hi")), raising=False
    )
    installed["hello"] = EntryPoint("hello", "rewardsignal.cli:hello", cli.GROUP)
    assert signal("hello").output == "hi\n"


def test_a_command_that_cannot_be_loaded_hinders_no_other(
    signal: Runner, installed: dict[str, EntryPoint]
) -> None:
    installed["broken"] = EntryPoint("broken", "no_such_module:command", cli.GROUP)
    assert signal("--help").exit_code == 0
    assert "no_such_module" in signal("broken").stderr
    assert signal("models", answers=[reply({"models": [], "data": []})]).exit_code == 0


@pytest.mark.parametrize(
    ("answer", "code", "hint"),
    [
        (refusal(401, "unauthorized"), 3, "signal login"),
        (refusal(403, "forbidden"), 3, ""),
        (refusal(404, "not_found"), 4, ""),
        (refusal(409, "run_closed"), 5, "signal runs branch"),
        (refusal(409, "run_paused"), 5, "signal runs resume"),
        (refusal(503, "unavailable"), 5, ""),
        (refusal(500, "internal_error"), 1, ""),
        (httpx2.UnsupportedProtocol("x"), 5, "signal up"),
    ],
)
def test_exit_codes(
    signal: Runner, answer: Any, code: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardsignal._transport.UNSEEN_RETRY_S", 0.0)
    result = signal("runs", "show", "run_1", answers=[answer])
    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")
    assert hint in result.stderr
    assert result.stdout == ""


def test_every_wrong_field_is_told(signal: Runner) -> None:
    wrong = [{"param": name, "code": "validation_error", "message": f"bad {name}"} for name in "ab"]
    result = signal("models", answers=[refusal(422, "validation_error", details=wrong)])
    assert "b: bad b" in result.stderr


def test_wrong_usage(signal: Runner) -> None:
    assert signal("runs", "show").exit_code == 2
    assert signal("nothing").exit_code == 2


def test_no_key() -> None:
    result = CliRunner().invoke(cli.main, ["models"])
    assert result.exit_code == 3
    assert "signal login" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\n"),
        (click.Abort(), 130, "\n"),
        (PermissionError(13, "Permission denied", "there"), 1, "Permission denied: 'there'"),
    ],
)
def test_what_ends_a_command_early(
    signal: Runner,
    installed: dict[str, EntryPoint],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "failing", click.Command("failing", callback=fail), raising=False)
    installed["failing"] = EntryPoint("failing", "rewardsignal.cli:failing", cli.GROUP)
    result = signal("failing")
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(signal: Runner, shell: str) -> None:
    result = signal("completion", shell)
    assert "_SIGNAL_COMPLETE" in result.output
    assert result.exit_code == 0


def completed(words: str, position: int) -> list[str]:
    """What bash would be offered."""
    result = CliRunner().invoke(
        cli.main,
        prog_name="signal",
        env={"_SIGNAL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)},
    )
    return [line.split(",")[-1] for line in result.output.splitlines() if line]


def test_completion_of_commands_runs_models_and_profiles(
    signal: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {"data": [{"run_id": "run_1", "status": "ready", "base_model": "tiny"},
                     {"run_id": "run_2", "status": "ready", "base_model": "tiny"}],
            "has_more": False, "next_cursor": None}  # fmt: skip
    signal("models", answers=[reply(runs)])
    assert "runs" in completed("signal ru", 1)
    assert completed("signal runs show ", 3) == ["run_1", "run_2"]
    assert completed("signal train sft --resume run_2", 4) == ["run_2"]
    signal("models", answers=[reply({"models": ["tiny"], "data": [{"name": "tiny"}]})])
    assert completed("signal train sft --model t", 4) == ["tiny"]


def test_completion_is_silent_without_a_server(signal: Runner) -> None:
    signal("models", answers=[refusal(500, "internal_error")])
    assert completed("signal runs show ", 3) == []
    signal("models", answers=[httpx2.ConnectError("no")])
    assert completed("signal runs show ", 3) == []
