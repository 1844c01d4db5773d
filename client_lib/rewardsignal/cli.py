"""The command `signal`: a group whose commands come from the entry points `rewardsignal.commands`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no or a wrong API key, 4 not found, 5 in conflict with
the state of things or unavailable, 130 interrupted, 141 the reader of the output has gone.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from rewardsignal._exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConflictError,
    NotFoundError,
    RateLimitError,
    SignalAPIError,
    SignalConnectionError,
    SignalTimeoutError,
)
from rewardsignal._version import __version__

GROUP = "rewardsignal.commands"
SERVER_COMMANDS = ("doctor", "down", "keys", "status", "up")
SERVER_PACKAGE = "signal-server"
_EXIT_CODES: dict[type[SignalAPIError], int] = {
    AuthenticationError: 3,
    AuthorizationError: 3,
    NotFoundError: 4,
    ConflictError: 5,
    RateLimitError: 5,
    SignalConnectionError: 5,
    SignalTimeoutError: 5,
}


INTERRUPTED, PIPE_CLOSED = 130, 141
EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    no API key, or not a valid one
  4    not found
  5    in conflict with the state of things, or unavailable
  130  interrupted
  141  the reader of the output has gone
"""
_HINTS = {
    "unauthorized": "`signal login` stores another key.",
    "run_paused": "`signal runs resume RUN` goes on with it.",
    "rolled_back": "`signal runs show RUN` says what to accept.",
    "unknown_model": "`signal models` lists what there is.",
    "run_closed": "`signal runs branch RUN` goes on from its state in a new run.",
    "history_gone": "`signal runs show RUN` says from where it can be branched.",
}


class Commands(click.Group):
    """Loads a command when it is called for, so that `signal up` does not import what others need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all installed commands."""
        return sorted(_installed())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name. Fails in words when it cannot be loaded."""
        entry = _installed().get(cmd_name)
        if entry is None:
            return _absent(cmd_name) if cmd_name in SERVER_COMMANDS else None
        try:
            command = entry.load()
        except ImportError as error:
            return _broken(entry, error)
        return command if isinstance(command, click.Command) else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what ends it early becomes a message and an exit code."""
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except SignalAPIError as error:
            _tell(error)
            ctx.exit(exit_code(error))
        except BrokenPipeError:
            # Python would complain of it once more when it closes standard output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="signal")
def main() -> None:
    """Signal: a self-hosted training API for language models."""


def exit_code(error: SignalAPIError) -> int:
    """The exit code that says what kind of error it was."""
    if error.status_code == 503:
        return 5
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)


def _tell(error: SignalAPIError) -> None:
    click.echo(f"Error: {error}", err=True)
    for detail in error.details[1:]:
        click.echo(f"  {detail.get('param')}: {detail.get('message')}", err=True)
    if isinstance(error, SignalConnectionError):
        click.echo("`signal up` starts a server here; `signal login` names another.", err=True)
    elif error.code in _HINTS:
        click.echo(_HINTS[error.code], err=True)


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _absent(name: str) -> click.Command:
    message = (
        f"`signal {name}` belongs to the server, which is not installed here: "
        f"pip install '{SERVER_PACKAGE}[web,worker,embedded]'"
    )
    return _failing(name, message)


def _broken(entry: EntryPoint, error: ImportError) -> click.Command:
    package = entry.dist.name if entry.dist else entry.module
    return _failing(entry.name, f"`signal {entry.name}` of {package} cannot be loaded: {error}")


def _failing(name: str, message: str) -> click.Command:
    """A command that takes anything and says why it does not work."""

    @click.command(name, context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        raise click.ClickException(message)

    command.short_help = "(not installed)"
    return command


if __name__ == "__main__":
    sys.exit(main())
