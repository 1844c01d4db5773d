"""`signal checkpoints`: what runs have saved."""

from __future__ import annotations

from pathlib import Path

import click

from rewardsignal._cli.options import client, json_option, run_argument
from rewardsignal._cli.output import emit, local_time, print_table, size


@click.group()
def checkpoints() -> None:
    """Saved adapters and states of runs."""


@checkpoints.command("list")
@run_argument
@json_option
def list_checkpoints(run_id: str, as_json: bool) -> None:
    """What a run has saved, oldest first."""
    with client() as server:
        found = server.run(run_id).artifacts()
    if as_json:
        return emit([one.to_dict() for one in found])
    rows = (
        (one.name, one.mode, one.step, one.seq, size(one.size_bytes), local_time(one.created_at))
        for one in found
    )
    return print_table(("NAME", "MODE", "STEP", "SEQ", "SIZE", "SAVED"), rows)


@checkpoints.command()
@run_argument
@click.argument("name")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@json_option
def download(run_id: str, name: str, folder: Path, as_json: bool) -> None:
    """Download a checkpoint into DIR and check every file's sha256.

    An adapter is a plain PEFT folder. A download that was cut off goes on where it stopped.
    """
    with client() as server:
        run = server.run(run_id)
        run.download(name, folder)
        files = next(one for one in run.artifacts() if one.name == name).files
    if as_json:
        return emit({"folder": str(folder), "files": [file.path for file in files]})
    total = sum(file.size_bytes for file in files)
    return click.echo(f"{folder}: {len(files)} files, {size(total)}")
