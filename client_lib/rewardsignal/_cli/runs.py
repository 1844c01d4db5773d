"""`signal runs`: list, show, pause, resume, cancel, branch, certificate, delete."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import click

from rewardsignal._cli.following import logs, watch
from rewardsignal._cli.options import (
    client,
    confirm,
    json_option,
    label_option,
    run_argument,
    yes_option,
)
from rewardsignal._cli.output import emit, local_time, note, print_facts, print_table, size
from rewardsignal._schemas import Run


@click.group()
def runs() -> None:
    """Training runs."""


runs.add_command(watch)
runs.add_command(logs)


@runs.command("list")
@click.option("--status", help="Only runs of this status.")
@click.option("--label", help="Only runs with this label: NAME or NAME=VALUE.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="At most.")
@json_option
def list_runs(status: str | None, label: str | None, limit: int, as_json: bool) -> None:
    """Your runs, newest first."""
    with client() as server:
        pages = server.list_runs(status=status, label=label, page_size=min(limit, 100))
        found = list(islice(pages, limit))
    if as_json:
        return emit([run.to_dict() for run in found])
    rows = (
        (run.run_id, run.name, run.base_model, run.status, run.current_step,
         local_time(run.created_at))
        for run in found
    )  # fmt: skip
    return print_table(("RUN", "NAME", "MODEL", "STATUS", "STEP", "CREATED"), rows)


@runs.command("show")
@run_argument
@json_option
def show_run(run_id: str, as_json: bool) -> None:
    """One run with its configuration and checkpoints."""
    with client() as server:
        run = server.run(run_id)
        saved = run.artifacts()
    if as_json:
        return emit({**run.info.to_dict(), "artifacts": [one.to_dict() for one in saved]})
    kept = [(f"checkpoint {one.name}", size(one.size_bytes)) for one in saved]
    return print_facts([*_facts(run.info), *kept])


@runs.command()
@run_argument
@json_option
def pause(run_id: str, as_json: bool) -> None:
    """Write a snapshot and free the device; what is queued stays.

    `signal runs resume` goes on, on whichever device is free then.
    """
    with client() as server:
        _changed(server.run(run_id).pause(), as_json)


@runs.command()
@run_argument
@click.option(
    "--accept",
    type=click.Choice(("rebuilt", "rolled_back")),
    help="Take note of why the run was held, as `signal runs show` says.",
)
@json_option
def resume(run_id: str, accept: str | None, as_json: bool) -> None:
    """Go on with a run that is paused or held."""
    with client() as server:
        _changed(server.run(run_id).resume(accept), as_json)


@runs.command()
@run_argument
@yes_option
@json_option
def cancel(run_id: str, yes: bool, as_json: bool) -> None:
    """End a run now: what is queued is cancelled and nothing is saved."""
    with client() as server:
        run = server.run(run_id)
        confirm(f"Cancel {_named(run.info)} without saving it?", yes)
        closed = run.cancel()
    if as_json:
        return emit(closed.to_dict())
    return click.echo(f"{closed.run_id}: {closed.status} at step {closed.current_step}")


@runs.command()
@run_argument
@yes_option
@json_option
def delete(run_id: str, yes: bool, as_json: bool) -> None:
    """Erase a run and everything of it: journal, metrics, checkpoints. An open one is cancelled."""
    with client() as server:
        run = server.run(run_id)
        confirm(f"Delete {_named(run.info)} and all that it saved, for good?", yes)
        run.delete()
    if as_json:
        return emit({"run_id": run_id, "deleted": True})
    return click.echo(f"{run_id}: deleted")


@runs.command()
@run_argument
@click.option("--at-seq", type=click.IntRange(0), help="After this operation; else the newest.")
@click.option("--name", help="The new run's name.")
@click.option("--learning-rate", type=float, help="Another learning rate.")
@click.option("--weight-decay", type=float, help="Another weight decay.")
@label_option
@json_option
def branch(
    run_id: str,
    at_seq: int | None,
    name: str | None,
    labels: dict[str, str] | None,
    as_json: bool,
    **overrides: float | None,
) -> None:
    """A new run that begins with this one's exact state; prints its id."""
    with client() as server:
        fork = server.run(run_id).branch(at_seq, name=name, labels=labels, **overrides)
    if as_json:
        return emit(fork.info.to_dict())
    if sys.stdout.isatty() and fork.info.parent:
        note(f"Branched from {run_id} after operation {fork.info.parent.seq}:")
    return click.echo(fork.run_id)


@runs.command()
@run_argument
@json_option
def certificate(run_id: str, as_json: bool) -> None:
    """A run's state in hashes: equal ones mean equal bits."""
    with client() as server:
        found = server.run(run_id).certificate()
    if as_json:
        return emit(found.to_dict())
    names = ("sha256", "weights", "moments", "gradients", "step", "state_seq")
    return print_facts([(name, found[name]) for name in names])


def _changed(run: Run, as_json: bool) -> None:
    if as_json:
        return emit(run.to_dict())
    return click.echo(f"{run.run_id}: {run.status} at step {run.current_step}")


def _named(run: Run) -> str:
    facts = ", ".join(filter(None, (run.name, f"{run.status} at step {run.current_step}")))
    return f"{run.run_id} ({facts})"


def _facts(run: Run) -> list[tuple[str, Any]]:
    hold = run.hold
    facts = [
        ("run", run.run_id),
        ("name", run.name),
        ("model", run.base_model),
        ("status", run.status),
        ("error", run.error.message if run.error else None),
        ("held", f"{hold.reason}; resume --accept {hold.accept}" if hold and hold.accept else None),
        ("step", run.current_step),
        ("queued", run.queued),
        ("device", f"{run.device.name} on {run.device.host}" if run.device else None),
        ("parent", f"{run.parent.run_id} after {_origin(run)}" if run.parent else None),
        ("branchable", _span(run.branchable)),
        ("created", local_time(run.created_at)),
        ("ended", local_time(run.ended_at)),
    ]
    labels = [(f"label {name}", value) for name, value in run.labels.items()]
    config = [(f"config {name}", value) for name, value in run.config.items()]
    return [*facts, *labels, *config]


def _origin(run: Run) -> str:
    assert run.parent is not None
    return run.parent.artifact or f"operation {run.parent.seq}"


def _span(kept: dict[str, int] | None) -> str | None:
    return f"operations {kept['from']} to {kept['to']}" if kept else None
