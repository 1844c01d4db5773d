"""`signal up`, `down`, `status`, `keys` and `doctor`: the server's part of the command line.

The client's command finds these through the entry-point group `rewardsignal.commands`, so this module
imports nothing heavy until a command runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")

_data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the stack keeps everything.  [default: $SIGNAL_DATA_DIR, else ~/.local/share/signal]",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Turns a StackError into a message and exit code 1, without a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from web.stack.errors import StackError

        try:
            return command(*args, **kwargs)
        except StackError as error:
            raise click.ClickException(str(error)) from None

    return run


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any."
)
@_data_dir
@click.option("--devices", help="auto, cuda, cpu:SLOTS or cpu:SLOTSxTHREADS.  [default: auto]")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=PATH",
    help="A model that users may name; with SIGNAL_ALLOW_HUB=1 also NAME=ORG/MODEL of the hub.",
)
@click.option("--detach", is_flag=True, help="Return once it serves; `signal down` stops it.")
@click.option(
    "--profile/--no-profile",
    default=True,
    help="Store address and key as the profile `local`, where `signal` and SignalClient() find them.",
)
@_json
@_plainly
def up(
    host: str,
    port: int,
    data_dir: Path | None,
    devices: str | None,
    models: tuple[str, ...],
    detach: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Start Signal on this machine: API, workers, queue and Flower.

    Runs until Ctrl-C, or with --detach until `signal down`. Where it runs already on the same data
    folder, prints its addresses.
    """
    from web.stack import launch, ports
    from web.stack.errors import AlreadyRunsError
    from web.stack.options import Options, check_devices, parse_model

    folder = _folder(data_dir)
    if devices:
        check_devices(devices)
    options = Options(str(folder.root), host, port, devices, tuple(map(parse_model, models)))
    if found := launch.running(folder):
        return _show_running(found, profile=profile, as_json=as_json)
    if not ports.is_loopback(host):
        click.echo(f"Warning: {host} can be reached from outside, over plain HTTP.", err=True)

    def serving(info: dict[str, Any]) -> None:
        _show_up(info, profile=profile, as_json=as_json)
        if not as_json and not detach:
            click.echo("Ctrl-C stops it.")

    start = launch.detached if detach else launch.foreground
    try:
        return start(options, serving)
    except AlreadyRunsError:
        # Another `up` was quicker by a moment.
        if found := launch.running(folder):
            return _show_running(found, profile=profile, as_json=as_json)
        raise


@click.command()
@_data_dir
@_plainly
def down(data_dir: Path | None) -> None:
    """Stop Signal: everything that `up` started. What it stores stays, its profile too."""
    from web.stack import launch

    folder = _folder(data_dir)
    stopped = launch.stop(folder)
    click.echo(f"Stopped {folder.root}." if stopped else f"Nothing runs on {folder.root}.")


@click.command()
@_data_dir
@_json
@_plainly
def status(data_dir: Path | None, as_json: bool) -> None:
    """Say what runs: processes, devices, runs, queue lengths, journals. Exit code 1 if nothing does."""
    from web.stack import status as report

    found = report.gather(_folder(data_dir))
    click.echo(json.dumps(found, indent=1) if as_json else report.as_text(found))
    if not found["running"]:
        raise SystemExit(1)


@click.group()
def keys() -> None:
    """API keys of this server."""


@keys.command()
@click.option("--user", required=True, help="The user's name; made where there is none.")
@_data_dir
@_json
@_plainly
def create(user: str, data_dir: Path | None, as_json: bool) -> None:
    """Make an API key. It is shown this once."""
    from web.stack import accounts

    key = accounts.create_key(_folder(data_dir), user)
    click.echo(json.dumps({"user": user, "api_key": key}) if as_json else key)


@keys.command("list")
@_data_dir
@_json
@_plainly
def list_keys(data_dir: Path | None, as_json: bool) -> None:
    """All keys: whose, how old, when last used. The keys themselves are stored nowhere."""
    from web.stack import accounts

    found = accounts.list_keys(_folder(data_dir))
    if as_json:
        return click.echo(json.dumps(found, indent=1))
    width = max([len("USER"), *(len(str(key["user"])) for key in found)])
    click.echo(f"{'KEY':<12}  {'USER':<{width}}  {'CREATED':<20}  LAST USED")
    for key in found:
        used = "revoked" if key["revoked_at"] else key["last_used_at"] or "-"
        click.echo(f"{key['key_id']}  {key['user']:<{width}}  {key['created_at']}  {used}")
    return None


@keys.command()
@click.argument("key_id", metavar="KEY")
@_data_dir
@_plainly
def revoke(key_id: str, data_dir: Path | None) -> None:
    """Make a key useless. KEY is its id, as `signal keys list` and `signal whoami` show it."""
    from web.stack import accounts

    accounts.revoke_key(_folder(data_dir), key_id)
    click.echo(f"{key_id} opens nothing any more.")


@click.command()
@_data_dir
@_json
@_plainly
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Check this machine, and say how to mend what is found. Exit code 1 if something must be mended."""
    from web.stack import doctor as checks

    findings = checks.examine(_folder(data_dir))
    if as_json:
        click.echo(json.dumps({"findings": [finding.to_dict() for finding in findings]}, indent=1))
    else:
        for finding in findings:
            click.echo(str(finding))
    if any(finding.level == "error" for finding in findings):
        raise SystemExit(1)


def _folder(data_dir: Path | None) -> Any:
    from web.stack.folder import Folder, default_folder

    return Folder((data_dir or default_folder()).expanduser().resolve())


def _show_running(info: dict[str, Any], *, profile: bool, as_json: bool) -> None:
    if not as_json:
        click.echo("It runs already; nothing was changed (stop it with `signal down`).", err=True)
    _show_up(info, profile=profile, as_json=as_json)


def _show_up(info: dict[str, Any], *, profile: bool, as_json: bool) -> None:
    stored = _store_profile(info) if profile else None
    if as_json:
        click.echo(json.dumps(info))
        return
    click.echo(f"Signal serves at {info['base_url']}  (API reference: {info['base_url']}/docs)")
    click.echo(f"  API key  {info['api_key']}")
    if info["flower_url"]:
        click.echo(f"  Flower   {info['flower_url']}  (login {info['flower_login']})")
    click.echo(f"  Data     {info['data_dir']}")
    if stored:
        click.echo(f"  Profile  {stored}")


def _store_profile(info: dict[str, Any]) -> str | None:
    """What was stored, in words. A stack that serves is not stopped because it could not be."""
    from web.stack import profile as profiles
    from web.stack.errors import StackError

    try:
        return profiles.store(info["base_url"], info["api_key"])
    except StackError as error:
        click.echo(f"Warning: {error}", err=True)
        return None


GROUP = click.Group("signal", commands=[up, down, status, keys, doctor])
