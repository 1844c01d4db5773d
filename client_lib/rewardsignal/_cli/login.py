"""`signal login`, `whoami`, `logout` and `use`: which server, and as whom."""

from __future__ import annotations

import os
import sys
from typing import Any
from urllib.parse import urlsplit

import click
from click.shell_completion import CompletionItem

from rewardsignal import _config
from rewardsignal._cli.options import json_option
from rewardsignal._cli.output import emit, note, print_facts, print_table
from rewardsignal._client import SignalClient
from rewardsignal._config import Profile
from rewardsignal._exceptions import AuthenticationError
from rewardsignal._schemas import Account

TIMEOUT_S = 30.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _complete_profiles(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    try:
        names = _config.load().by_name
    except AuthenticationError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(begun)]


@click.command()
@click.option("--base-url", metavar="URL", help="The server's address.")
@click.option("--with-token", is_flag=True, help="Read the API key from standard input.")
@click.option(
    "--profile", default=_config.LOGIN, show_default=True, metavar="NAME",
    help="Store it under another name, to keep several servers.",
)  # fmt: skip
@json_option
def login(base_url: str | None, with_token: bool, profile: str, as_json: bool) -> None:
    """Store a server's address and an API key, once the server has said whose key it is.

    Asks for both; the key is not shown. From then on SignalClient() and `signal` use them.
    """
    if profile == _config.LOCAL:
        raise click.UsageError(f"--profile: `signal up` writes {_config.LOCAL}; take another name.")
    if not with_token and not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: signal login --with-token < FILE")
    url = base_url or _asked_address(profile, ask=not with_token)
    _warn_of_plain_http(url)
    key = _key_from_stdin() if with_token else str(click.prompt("API key", hide_input=True)).strip()
    found = Profile(url.rstrip("/"), key)
    account = _account(found)
    _config.save(profile, found)
    _warn_of_environment()
    if as_json:
        return emit({**account.to_dict(), "base_url": found.base_url, "profile": profile})
    return click.echo(f"Logged in to {found.base_url} as {account.name} (profile {profile}).")


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Whose key is in use, for which server, and where it comes from."""
    found = _config.resolve(None, None)
    account, source = _account(found), _source(found)
    if as_json:
        return emit({**account.to_dict(), "base_url": found.base_url, "key_from": source})
    return print_facts(
        [
            ("user", f"{account.name} ({account.user_id})"),
            ("server", found.base_url),
            ("key", f"{account.key_id}, from {source}"),
        ]
    )


@click.command()
@click.option(
    "--profile", metavar="NAME", shell_complete=_complete_profiles,
    help="Which one.  [default: the one in use]",
)  # fmt: skip
@json_option
def logout(profile: str | None, as_json: bool) -> None:
    """Forget a stored key. The key itself stays valid until its server's operator revokes it."""
    name = profile or os.environ.get("SIGNAL_PROFILE") or _config.load().current
    forgotten = name is not None and _config.forget(name)
    if profile and not forgotten:
        raise AuthenticationError(f"There is no profile {profile!r} in {_config.path()}.")
    _warn_of_environment()
    if as_json:
        return emit({"profile": name if forgotten else None})
    text = (
        f"Forgot the profile {name}." if forgotten else "No profile is in use: nothing to forget."
    )
    return click.echo(text)


@click.command()
@click.argument("name", required=False, shell_complete=_complete_profiles)
@json_option
def use(name: str | None, as_json: bool) -> None:
    """Use another stored profile from now on; without NAME, list them.

    `signal up` stores `local`, `signal login` stores `default` or what its --profile says.
    """
    if name:
        _config.use(name)
        _warn_of_environment()
    stored = _config.load()
    rows = [
        {"profile": one, "base_url": profile.base_url, "current": one == stored.current}
        for one, profile in sorted(stored.by_name.items())
    ]
    if as_json:
        return emit(rows)
    if name:
        return click.echo(f"{name}: {stored.by_name[name].base_url}")
    marks = ((row["profile"], row["base_url"], "*" if row["current"] else "") for row in rows)
    return print_table(("PROFILE", "SERVER", "IN USE"), marks)


def _account(found: Profile) -> Account:
    with SignalClient(found.api_key, found.base_url, TIMEOUT_S, retry_for=0.0) as client:
        return client.me()


def _asked_address(profile: str, *, ask: bool) -> str:
    stored = _config.load().by_name.get(profile)
    likely = os.environ.get("SIGNAL_BASE_URL") or (
        stored.base_url if stored else _config.DEFAULT_BASE_URL
    )
    return str(click.prompt("Server", default=likely)).strip() if ask else likely


def _key_from_stdin() -> str:
    key = sys.stdin.read().strip()
    if not key:
        raise click.UsageError("--with-token: standard input has no key.")
    return key


def _source(found: Profile) -> str:
    """Where the key of a resolved profile was found."""
    if os.environ.get("SIGNAL_API_KEY"):
        return "SIGNAL_API_KEY"
    stored = _config.load()
    names = [stored.current or "", *stored.by_name]
    name = next(
        n for n in names if n in stored.by_name and stored.by_name[n].api_key == found.api_key
    )
    return f"the profile {name}"


def _warn_of_environment() -> None:
    names: list[Any] = [n for n in ("SIGNAL_BASE_URL", "SIGNAL_API_KEY") if os.environ.get(n)]
    if names:
        note(f"Note: {' and '.join(names)} of the environment go before what is stored.")


def _warn_of_plain_http(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        note(f"Warning: {parts.hostname} is spoken to over plain HTTP: others can read the key.")
