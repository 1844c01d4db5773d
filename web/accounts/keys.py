"""The format of an API key: `sk-signal-<public id>-<secret><checksum>`. Pure functions.

The checksum lets a typo be refused without a look into SQL, and secret scanners recognise a key. The
key is shown once; what is stored is the SHA-256 of the whole (a 190-bit secret needs no slow hash).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass

PREFIX = "sk-signal-"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PUBLIC, _SECRET, _CHECK = 12, 32, 6
_KEY = re.compile(rf"{PREFIX}([0-9A-Za-z]{{{_PUBLIC}}})-[0-9A-Za-z]{{{_SECRET + _CHECK}}}")


@dataclass(frozen=True)
class NewKey:
    """A key just made: `text` is for its owner, `public_id` and `digest` are stored."""

    text: str
    public_id: str
    digest: str


def new_key() -> NewKey:
    """A key from the system's randomness."""
    public_id, secret = _random(_PUBLIC), _random(_SECRET)
    bare = f"{PREFIX}{public_id}-{secret}"
    text = bare + _checksum(bare)
    return NewKey(text, public_id, digest(text))


def public_id(text: str) -> str | None:
    """The public id of a well-formed key; None when its form or checksum is wrong."""
    match = _KEY.fullmatch(text)
    if match is None or _checksum(text[:-_CHECK]) != text[-_CHECK:]:
        return None
    return match[1]


def digest(text: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(bare: str) -> str:
    value, out = zlib.crc32(bare.encode()), ""
    for _ in range(_CHECK):
        value, digit = divmod(value, len(_ALPHABET))
        out = _ALPHABET[digit] + out
    return out
