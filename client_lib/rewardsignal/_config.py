"""The profile file: which server is spoken to, and with which key, when nothing else says so.

`signal login` and `signal up` write it, `SignalClient()` reads it:

    {"current": "default", "profiles": {"default": {"base_url": "https://…", "api_key": "sk-signal-…"}}}

It lies in the folder `rewardsignal` of the platform's config place (`SIGNAL_CONFIG_DIR` names another
folder), and its owner alone may read it. `signal login` writes the profile `default` and makes it the
current one; `signal up` writes `local`, and makes that the current one unless a login is.
`SIGNAL_PROFILE` picks one for one process. A key is sent to the server that it was stored for, and to no
other. The server's `web/stack/profile.py` writes the same form. Imports nothing of ours but the errors.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from platformdirs import user_config_dir

from rewardsignal._exceptions import AuthenticationError

log = logging.getLogger(__name__)

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
LOGIN, LOCAL = "default", "local"


@dataclass(frozen=True)
class Profile:
    """A server's address and a key for it."""

    base_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True)
class Profiles:
    """What the file holds: profiles by name, and the name of the one in use."""

    current: str | None = None
    by_name: Mapping[str, Profile] = field(default_factory=dict)

    def chosen(self) -> Profile | None:
        """The profile that SIGNAL_PROFILE names, else the current one.

        Raises AuthenticationError when SIGNAL_PROFILE names none.
        """
        name = os.environ.get("SIGNAL_PROFILE")
        if name and name not in self.by_name:
            raise AuthenticationError(f"SIGNAL_PROFILE: there is no profile {name!r} in {path()}.")
        return self.by_name.get(name or self.current or "")

    def for_server(self, base_url: str) -> Profile | None:
        """The profile of a server: the chosen one if it is of that server, else any that is."""
        chosen = self.chosen()
        others = [chosen, *self.by_name.values()] if chosen else list(self.by_name.values())
        return next((one for one in others if _same(one.base_url, base_url)), None)


def path() -> Path:
    """Where the file is, whether there is one or not."""
    chosen = os.environ.get("SIGNAL_CONFIG_DIR")
    return Path(chosen or user_config_dir("rewardsignal", appauthor=False)) / "profiles.json"


def resolve(api_key: str | None, base_url: str | None) -> Profile:
    """The server and the key: what is given, else the environment's, else the profile's.

    Raises AuthenticationError when there is no key for that server, or the file is damaged.
    """
    key = api_key or os.environ.get("SIGNAL_API_KEY")
    url = base_url or os.environ.get("SIGNAL_BASE_URL")
    if key and url:
        return Profile(url, key)
    stored = load()
    found = stored.for_server(url) if url else stored.chosen()
    if key:
        return Profile(found.base_url if found else DEFAULT_BASE_URL, key)
    if found is None:
        raise AuthenticationError(_no_key(url, stored))
    return Profile(url or found.base_url, found.api_key)


def load() -> Profiles:
    """What the file holds; nothing when there is no file. Raises AuthenticationError when damaged."""
    file = path()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        profiles = {name: _profile(one) for name, one in raw.get("profiles", {}).items()}
        current = raw.get("current")
    except FileNotFoundError:
        return Profiles()
    except OSError as error:
        raise AuthenticationError(f"The profile file {file} cannot be read: {error}") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        message = f"The profile file {file} is damaged: delete it, then `signal login` once more."
        raise AuthenticationError(message) from None
    _warn_if_open(file)
    return Profiles(current if isinstance(current, str) else None, profiles)


def save(name: str, profile: Profile) -> None:
    """Store a profile and make it the current one. Raises OSError."""
    stored = load()
    write(Profiles(name, {**stored.by_name, name: profile}))


def use(name: str) -> Profile:
    """Make a stored profile the current one. Raises AuthenticationError when there is none."""
    stored = load()
    if name not in stored.by_name:
        known = ", ".join(sorted(stored.by_name)) or "none"
        raise AuthenticationError(f"There is no profile {name!r} in {path()}; there is: {known}.")
    write(Profiles(name, stored.by_name))
    return stored.by_name[name]


def forget(name: str) -> bool:
    """Remove a profile; False when there is none. Nothing else becomes the current one instead."""
    stored = load()
    if name not in stored.by_name:
        return False
    left = {one: profile for one, profile in stored.by_name.items() if one != name}
    write(Profiles(None if stored.current == name else stored.current, left))
    return True


def write(profiles: Profiles) -> None:
    """Write the file in one step, never readable by others. Raises OSError."""
    file = path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    by_name = {name: asdict(profile) for name, profile in profiles.by_name.items()}
    text = json.dumps({"current": profiles.current, "profiles": by_name}, indent=2) + "\n"
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
    os.replace(part, file)


def _profile(raw: Mapping[str, Any]) -> Profile:
    url, key = raw["base_url"], raw["api_key"]
    if not (isinstance(url, str) and isinstance(key, str) and url and key):
        raise ValueError("a profile is a base_url and an api_key")
    return Profile(url, key)


def _warn_if_open(file: Path) -> None:
    # Windows has no such bits: os.stat makes them up there.
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        log.warning("Others can read the API keys in %s: chmod 600 '%s'", file, file)


def _same(one: str, other: str) -> bool:
    return one.rstrip("/").lower() == other.rstrip("/").lower()


def _no_key(url: str | None, stored: Profiles) -> str:
    of = f" of {url}" if url else " in use"
    names = ", ".join(sorted(stored.by_name))
    return (
        f"No API key: pass api_key, set SIGNAL_API_KEY, or store one with `signal login`; {path()} has "
        + (f"{names}, but none{of} (`signal use NAME`)." if names else "none.")
    )
