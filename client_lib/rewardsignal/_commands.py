"""The commands that need a server's address and a key: `signal runs` and `signal models`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import click

from rewardsignal._client import SignalClient
from rewardsignal._schemas import Run, RunEvent

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group()
def runs() -> None:
    """Training runs."""


@runs.command("list")
@click.option("--status", help="Only runs of this status.")
@click.option("--label", help="Only runs with this label: NAME or NAME=VALUE.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="At most.")
@_json
def list_runs(status: str | None, label: str | None, limit: int, as_json: bool) -> None:
    """Your runs, newest first."""
    with _client() as client:
        found = list(
            islice(client.list_runs(status=status, label=label, page_size=min(limit, 100)), limit)
        )
    if as_json:
        return _print_json([run.to_dict() for run in found])
    rows = ((r.run_id, r.name, r.base_model, r.status, r.current_step, r.created_at) for r in found)
    return _print_table(("RUN", "NAME", "MODEL", "STATUS", "STEP", "CREATED"), rows)


@runs.command("show")
@click.argument("run_id")
@_json
def show_run(run_id: str, as_json: bool) -> None:
    """One run with its configuration and artifacts."""
    with _client() as client:
        run = client.run(run_id)
        artifacts = run.artifacts()
    if as_json:
        body = run.info.to_dict()
        return _print_json({**body, "artifacts": [one.to_dict() for one in artifacts]})
    saved = ((f"artifact {one.name}", f"{one.size_bytes:,} bytes") for one in artifacts)
    return _print_table(("", ""), [*_facts(run.info), *saved])


@runs.command("watch")
@click.argument("run_id")
@click.option("--after", default=0, show_default=True, help="Only events with a greater id.")
@_json
def watch_run(run_id: str, after: int, as_json: bool) -> None:
    """What happens to a run, until it ends."""
    with _client() as client:
        for event in client.run(run_id).watch(after):
            click.echo(json.dumps(event.to_dict()) if as_json else _told(event))


@click.command()
@_json
def models(as_json: bool) -> None:
    """The models that runs can be made of."""
    with _client() as client:
        found = client.models()
    if as_json:
        return _print_json([model.to_dict() for model in found])
    rows = (
        (m.name, m.architecture, f"{m.num_parameters:,}", f"{m.context_length:,}") for m in found
    )
    return _print_table(("MODEL", "ARCHITECTURE", "PARAMETERS", "CONTEXT"), rows)


def _client() -> SignalClient:
    return SignalClient()


def _told(event: RunEvent) -> str:
    """An event as one line: when, what, and its plain facts."""
    plain = {
        name: value for name, value in event.data.items() if not isinstance(value, dict | list)
    }
    facts = ", ".join(f"{name} {value}" for name, value in plain.items() if value is not None)
    return f"{event.at}  {event.type.replace('_', ' '):<18}{facts}".rstrip()


def _facts(run: Run) -> list[tuple[str, Any]]:
    device = f"{run.device.name} on {run.device.host}" if run.device else None
    facts = [
        ("run", run.run_id),
        ("name", run.name),
        ("model", run.base_model),
        ("status", run.status),
        ("error", run.error.message if run.error else None),
        ("step", run.current_step),
        ("queued", run.queued),
        ("device", device),
        ("created", run.created_at),
        ("ended", run.ended_at),
    ]
    config = [(f"config {name}", value) for name, value in run.config.items()]
    labels = [(f"label {name}", value) for name, value in run.labels.items()]
    return [(name, value) for name, value in (*facts, *labels, *config) if value is not None]


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    # Here and not above: rich takes a tenth of a second, which --json need not wait for.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, show_header=any(head), pad_edge=False)
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    # Off a terminal nothing is cut to a width that nobody has.
    Console(width=None if sys.stdout.isatty() else 240).print(table)
