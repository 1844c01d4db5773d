"""One spelling of a JSON value, so that equal facts have equal hashes in every process and version."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(value: Any) -> bytes:
    """JSON in ASCII with sorted keys and no space. Raises ValueError for NaN and infinities."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def digest(value: Any) -> str:
    """The sha256 of `canonical(value)` in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()
