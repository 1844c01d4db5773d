"""The losses by name, with their options and the rows that they take: what the web tier knows of them.

Built-in ones are in the modules of this package; an operator's come from the entry-point group
`signal.losses`. Nothing here imports torch: `workers.engine.losses` computes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib import metadata

from schemas.errors import SignalError
from schemas.losses import group, policy, preference, supervised
from schemas.losses.spec import LossSpec, Option, Options

__all__ = ["BUILT_IN", "GROUP", "LossSpec", "Option", "Options", "find_loss", "losses"]

log = logging.getLogger(__name__)

GROUP = "signal.losses"
BUILT_IN: Mapping[str, LossSpec] = {
    spec.name: spec for module in (supervised, preference, policy, group) for spec in module.LOSSES
}


@cache
def losses() -> Mapping[str, LossSpec]:
    """Every loss of this process: the built-in ones and those of installed packages."""
    found = dict(BUILT_IN)
    for entry in metadata.entry_points(group=GROUP):
        spec = _load(entry)
        if spec is None or spec.name in found:
            log.error(
                "the loss %s of %s is left out: no LossSpec, or a name in use", entry.name, entry
            )
        else:
            found[spec.name] = spec
    return found


def find_loss(name: str, param: str = "loss_fn") -> LossSpec:
    """The loss of that name. Raises SignalError unknown_loss."""
    spec = losses().get(name)
    if spec is None:
        known = ", ".join(losses())
        raise SignalError(
            "unknown_loss", f"There is no loss {name!r}; there are: {known}.", param=param
        )
    return spec


def _load(entry: metadata.EntryPoint) -> LossSpec | None:
    try:
        spec = entry.load()
    except Exception:
        # Another's package: what is wrong with it must not take the whole server down.
        log.exception("the loss %s cannot be imported", entry.name)
        return None
    return spec if isinstance(spec, LossSpec) else None
