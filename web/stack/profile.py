"""The profile that `signal up` writes, so that programs of this user find the stack without being told.

The SDK `rewardsignal` reads it and `signal login` writes the same file, in the form that
`rewardsignal/_config.py` says; the server does not import the client, so a test compares the two.
What `signal up` writes is the profile `local`. It becomes the current one unless a login is: whoever
works with another server goes on with that until `signal use local`. `signal down` leaves it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from platformdirs import user_config_dir

from web.stack.errors import StackError
from web.stack.folder import write_private

NAME = "local"


def path() -> Path:
    """Where the SDK looks for profiles."""
    chosen = os.environ.get("SIGNAL_CONFIG_DIR")
    return Path(chosen or user_config_dir("rewardsignal", appauthor=False)) / "profiles.json"


def store(base_url: str, api_key: str) -> str:
    """Write the stack's profile; says in words what programs use now. Raises StackError."""
    file = path()
    try:
        content = _read(file)
        profiles = content.setdefault("profiles", {})
        profiles[NAME] = {"base_url": base_url, "api_key": api_key}
        current = content.get("current")
        if current not in profiles:
            current = content["current"] = NAME
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(file, json.dumps(content, indent=2) + "\n")
        other = None if current == NAME else profiles[current]["base_url"]
    except OSError as error:
        raise StackError(f"the profile was not stored: {error}") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise StackError(f"the profile was not stored: {file} is damaged; delete it") from None
    return _told(str(current), other)


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def _told(current: str, other: str | None) -> str:
    if other is None:
        return f"{NAME} (`signal` and SignalClient() use it)"
    return (
        f"{NAME}; `signal` and SignalClient() go on with {current}, {other} "
        f"(`signal use {NAME}` changes that)"
    )
