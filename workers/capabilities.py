"""What this installation can do beside the usual, without importing it (torch-free).

The web tier asks at create, so that a run that cannot be honoured is refused and not begun; a worker on a
host that lacks something refuses by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from schemas.errors import Detail

_LIBRARY = "bitsandbytes"


def missing(config: Mapping[str, Any]) -> Iterator[Detail]:
    """The settings of a run that need what is not installed."""
    if find_spec(_LIBRARY) is not None:
        return
    for name in ("optimizer", "quantization"):
        if config.get(name) in ("adamw_8bit", "nf4", "int8"):
            message = (
                f"{config[name]} needs the package {_LIBRARY}, which this server does not have."
            )
            yield Detail(name, "not_supported", message)
