"""`signal sample`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from rewardsignal._cli.options import client, json_option, run_argument
from rewardsignal._cli.output import emit_line, styled
from rewardsignal._cli.sampling import sampled_run, say, streamed

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(command: F) -> F:
    """How tokens are chosen, and from which weights."""
    options = (
        click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", type=click.FloatRange(0), help="0 is greedy."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True)),
        click.option("--top-k", type=int),
        click.option("--min-p", type=click.FloatRange(0, 1)),
        click.option("--stop", multiple=True, metavar="TEXT", help="May be given several times."),
        click.option("--seed", type=click.IntRange(0), help="The same seed draws the same."),
        click.option("--weights", metavar="WEIGHTS",
                     help="current: the newest; live: after everything submitted; base: without the "
                     "adapter; or a checkpoint.  [default: current]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are set, as `run.sample` takes them."""
    stop = {"stop": list(options["stop"])} if options["stop"] else {}
    plain = {name: value for name, value in options.items() if name != "stop"}
    return {**{name: value for name, value in plain.items() if value is not None}, **stop}


@click.command()
@run_argument
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Send PROMPT as a user's message.")
@click.option("--system", metavar="TEXT", help="A system message before it; with --chat.")
@click.option("--n", default=1, show_default=True, type=click.IntRange(1), help="Samples.")
@sampling_options
@json_option
def sample(
    run_id: str,
    prompt: str,
    chat: bool,
    system: str | None,
    n: int,
    weights: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sample from a run, shown as it is made. PROMPT - is standard input.

    A run that has ended is sampled from its newest checkpoint. With --json the whole answer is printed at
    its end, as the API gives it.
    """
    if system and not chat:
        raise click.UsageError("--system goes with --chat.")
    text = sys.stdin.read() if prompt == "-" else prompt
    asked: Any = _messages(text, system) if chat else text
    with client() as server, sampled_run(server, run_id, weights) as (run, chosen):
        wanted = {**given(options), "weights": chosen}
        if n == 1 and not as_json:
            streamed(run, asked, wanted)
            return None
        result = run.sample([asked], n=n, **wanted)
    if as_json:
        return emit_line(result.to_dict())
    for place, one in enumerate(result.samples[0], 1):
        click.echo(styled(f"--- {place} of {n} ({one.finish_reason})", dim=True))
        say(one.text)
        click.echo()
    return None


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]
