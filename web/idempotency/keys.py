"""The header `Idempotency-Key` of the current request."""

from __future__ import annotations

import re

from flask import request

from schemas.errors import Detail, SignalError

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def idempotency_key() -> str | None:
    """The key; None without one. Raises SignalError validation_error for an impossible one."""
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        text = "1 to 255 visible ASCII characters without a space are needed."
        detail = Detail(HEADER, "validation_error", text)
        raise SignalError("validation_error", text, param=HEADER, details=[detail])
    return key
