"""External checkpoints that only the holders of age keys can read: encrypted as each file is downloaded.

What lies in the server's storage is not encrypted; what leaves it by a signed address is, under names that
end in `.age`. Whoever has the address and no key has nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from marshmallow import ValidationError, fields, validate

from schemas.errors import SignalError
from web.context import services
from web.tinker.tables import CheckpointRow

SUFFIX = ".age"
# Noted with the checkpoint, where its owner sees it too.
FIELD = "age_encryption_recipients"
# The header and the tags of an encrypted file, at most, beside a 4096th for the tags of its blocks.
_MORE_BYTES = 64 * 1024
MOST = 20


def field() -> fields.List[str]:
    """The recipients of a request: public keys of age."""
    return fields.List(
        fields.String(validate=validate.And(validate.Length(1, 200), _check)),
        load_default=None, allow_none=True, validate=validate.Length(0, MOST),
    )  # fmt: skip


def noted(recipients: Sequence[str] | None) -> dict[str, str] | None:
    """What is noted with a checkpoint for these."""
    return {FIELD: ",".join(recipients)} if recipients else None


def recipients_of(row: CheckpointRow) -> list[str]:
    """Whom a checkpoint is for; empty when it is not encrypted."""
    text = (row.user_metadata or {}).get(FIELD, "") if row.kind == "external_weights" else ""
    return text.split(",") if text else []


def encrypted(key: str, recipients: Sequence[str]) -> BinaryIO:
    """A stored file, encrypted, as an open file that has no name.

    Raises SignalError not_found or storage_full.
    """
    storage = services().storage
    info = storage.stat(key)
    if info is None:
        raise SignalError("not_found", "The file is not in storage any more.")
    folder = storage.scratch(info.size + info.size // 4096 + _MORE_BYTES)
    try:
        _encrypt(key, folder / "file", recipients)
        return (folder / "file").open("rb")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _encrypt(key: str, target: Path, recipients: Sequence[str]) -> None:
    known = [_age().x25519.Recipient.from_str(one) for one in recipients]
    with services().storage.open(key) as reader, target.open("wb") as writer:
        _age().encrypt_io(reader, writer, known)


def _check(recipient: str) -> None:
    age = _age()
    try:
        age.x25519.Recipient.from_str(recipient)
    except age.RecipientError:
        raise ValidationError("A public key of age is needed: age1….") from None


def _age() -> Any:
    """Loaded when it is first needed: few servers ever encrypt."""
    try:
        import pyrage
    except ModuleNotFoundError:
        text = "The server lacks the package pyrage: without it there are no encrypted exports."
        raise SignalError("not_supported", text, param=FIELD) from None
    return pyrage
