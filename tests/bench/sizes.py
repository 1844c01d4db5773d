"""Installed sizes: the client, the web tier without torch, and everything, from this environment's records.

Walks the requirements of each from the installed distributions' metadata and sums what they own, so that
nothing needs to be installed again.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = {
    "client": ("rewardsignal", ""),
    "server_web": ("signal-server", "web"),
    "server_web_and_worker": ("signal-server", "web,worker"),
    "everything_embedded": ("signal-server", "web,worker,embedded"),
}


def measure() -> dict[str, Any]:
    """Megabytes (10^6 bytes) on disk, dependencies included."""
    return {name: round(sum(map(_size, closure(*root))) / 1e6, 1) for name, root in ROOTS.items()}


def closure(name: str, extras: str) -> set[str]:
    """Canonical names of a distribution and all it needs with these extras."""
    found: set[str] = set()
    todo = [(name, frozenset(filter(None, extras.split(","))))]
    seen = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found.add(canonicalize_name(name))
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if _applies(requirement, wanted):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"extra": extra}) for extra in (extras or {""}) | {""}
    )


def _size(name: str) -> int:
    total = 0
    for file in metadata.files(name) or []:
        path = file.locate()
        try:
            total += path.stat().st_size  # type: ignore[attr-defined]
        except OSError:
            continue
    return total
