"""Cursors of lists: a position, signed for the list that it belongs to."""

from __future__ import annotations

import hashlib
import hmac
import re

from schemas.errors import SignalError
from workers.settings import Settings

_CURSOR = re.compile(r"([0-9]{1,18})-([0-9a-f]{16})")


def encode(settings: Settings, scope: str, position: int) -> str:
    """A cursor after `position`; `scope` names the list with its owner and filters."""
    return f"{position}-{_mac(settings, scope, position)}"


def decode(settings: Settings, scope: str, text: str | None) -> int | None:
    """The position; None without a cursor. Raises SignalError bad_cursor."""
    if text is None:
        return None
    match = _CURSOR.fullmatch(text)
    if match:
        position = int(match[1])
        if hmac.compare_digest(match[2], _mac(settings, scope, position)):
            return position
    raise SignalError("bad_cursor", param="cursor")


def _mac(settings: Settings, scope: str, position: int) -> str:
    message = f"cursor|{scope}|{position}".encode()
    return hmac.new(settings.secret.encode(), message, hashlib.sha256).hexdigest()[:16]
