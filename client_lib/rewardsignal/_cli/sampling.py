"""Sampling for a reader: from which weights, and token by token.

A run that has ended takes no operations: a run of the moment, on the same model, samples from the ended
one's newest checkpoint and is deleted again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from rewardsignal._cli.output import note, printable
from rewardsignal._client import SignalClient
from rewardsignal._exceptions import SignalAPIError
from rewardsignal._run import SignalRun
from rewardsignal._schemas import CLOSED_STATUSES, Sample

PLACES = ("live", "current", "base")
LABEL = "signal.sample-from"


@contextmanager
def sampled_run(
    server: SignalClient, run_id: str, weights: str | None
) -> Iterator[tuple[SignalRun, Any]]:
    """A run to sample with, and the `weights` to ask it for."""
    run = server.run(run_id)
    if run.info.status not in CLOSED_STATUSES:
        yield run, _weights_of(run, weights)
        return
    chosen = _saved_weights(run, weights)
    told = chosen if isinstance(chosen, str) else chosen["artifact"]
    note(f"{run_id} is {run.info.status}: sampling from its {told}, by a run of the moment.")
    stand_in = server.create_run(run.info.base_model, lora_r=1, labels={LABEL: run_id})
    try:
        yield stand_in, chosen
    finally:
        _delete_quietly(stand_in)


def _weights_of(run: SignalRun, weights: str | None) -> Any:
    """What an open run is asked for: beside its training rather than in the way of it."""
    if weights is None:
        return "live" if run.info.config.get("lora_r") == 0 else "current"
    return weights if weights in PLACES else {"artifact": weights}


def _saved_weights(run: SignalRun, weights: str | None) -> Any:
    if weights == "base":
        return weights
    names = [one.name for one in run.artifacts()]
    name = names[-1] if names and weights in (None, *PLACES) else weights
    if name not in names:
        have = ", ".join(names) or "none"
        raise click.ClickException(
            f"{run.run_id} is {run.info.status} and has no checkpoint {name or 'to sample from'}; "
            f"it has: {have}. `signal runs branch {run.run_id}` goes on from its last state."
        )
    return {"run_id": run.run_id, "artifact": name}


def _delete_quietly(run: SignalRun) -> None:
    try:
        run.delete()
    except SignalAPIError as error:
        note(f"{run.run_id}, the run of the moment, was not deleted: {error}")


def streamed(run: SignalRun, prompt: Any, options: Mapping[str, Any]) -> Sample:
    """One sample, shown as it is made on a terminal; its whole text is printed in any case.

    A lost worker begins again: off a terminal, where nothing can be taken back, only the end is printed.
    """
    live, shown = on_terminal(), ""
    with run.stream_sample([prompt], **options) as stream:
        for token in stream:
            if token.restart:
                shown = _void(shown)
            elif live:
                shown += token.text
                say(token.text)
        sample = stream.result().samples[0][0]
    if sample.text.startswith(shown):
        say(sample.text[len(shown) :])
    else:
        say(f"\n{sample.text}")
    click.echo()
    return sample


def _void(shown: str) -> str:
    if shown:
        click.echo()
        note("[the worker was lost: from the beginning]")
    return ""


def say(text: str) -> None:
    """A piece of a model's text, at once; on a terminal without what would control it."""
    click.echo(printable(text, keep="\n\t") if on_terminal() else text, nl=False)
    sys.stdout.flush()


def on_terminal() -> bool:
    """Whether a reader sees it as it comes."""
    return sys.stdout.isatty()
