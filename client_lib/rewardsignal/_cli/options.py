"""What several commands take: the options, the client, the completion of run ids and model names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import click
from click.shell_completion import CompletionItem

from rewardsignal._client import SignalClient
from rewardsignal._exceptions import SignalAPIError

# How long a press of the tab key may wait for the server.
COMPLETION_S = 1.0
COMPLETED = 50

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def client(**options: Any) -> SignalClient:
    """A client of the server that the environment or the profile names."""
    return SignalClient(**options)


def _complete_runs(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    def found(server: SignalClient) -> Iterator[CompletionItem]:
        for run in islice(server.list_runs(page_size=COMPLETED), COMPLETED):
            about = " ".join(filter(None, (run.status, run.base_model, run.name)))
            yield CompletionItem(run.run_id, help=about)

    return _completions(found, begun)


def _complete_models(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    return _completions(lambda server: (CompletionItem(m.name) for m in server.models()), begun)


def _completions(
    find: Callable[[SignalClient], Iterator[CompletionItem]], begun: str
) -> list[CompletionItem]:
    """What the server knows that begins like this; nothing when it cannot be asked."""
    try:
        with client(timeout=COMPLETION_S, retry_for=0.0) as server:
            return [item for item in find(server) if item.value.startswith(begun)]
    except (SignalAPIError, OSError):
        return []


run_argument = click.argument("run_id", metavar="RUN", shell_complete=_complete_runs)


def run_option(help: str) -> Callable[..., Any]:
    """`--resume RUN`."""
    return click.option("--resume", metavar="RUN", help=help, shell_complete=_complete_runs)


def model_option(help: str) -> Callable[..., Any]:
    """`--model NAME`."""
    return click.option("--model", metavar="NAME", help=help, shell_complete=_complete_models)


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal. Raises Abort on a no, UsageError where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: say --yes.")
    click.confirm(question, abort=True, err=True)


def pairs(
    _: click.Context, parameter: click.Parameter, given: Sequence[str]
) -> dict[str, str] | None:
    """`NAME=VALUE…` as a dictionary; None when there are none."""
    found = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE.", param=parameter)
        found[name] = value
    return found or None


label_option = click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", callback=pairs,
    help="A label of the new run; may be given several times.",
)  # fmt: skip
