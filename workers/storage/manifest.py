"""Manifests: what a stored folder holds, each file with its size and sha256, and reading by them alone.

A manifest may be sealed: it then holds the sha256 of itself, so that its own facts are protected too.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.canonical import canonical, digest
from workers.storage.protocol import MANIFEST, Storage

SEAL = "sha256"
_CHUNK = 1 << 20


class Damaged(Exception):
    """A stored file lacks or is not what its manifest says; `file` is its path within the folder."""

    def __init__(self, file: str, why: str) -> None:
        """`why` follows the file's name in a sentence."""
        super().__init__(f"{file} {why}")
        self.file = file


def describe(folder: Path, path: Path) -> dict[str, Any]:
    """The entry of a file for its folder's manifest."""
    with path.open("rb") as file:
        hashed = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(folder).as_posix()
    return {"path": name, "size_bytes": path.stat().st_size, "sha256": hashed}


def sealed(manifest: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """The manifest with its own hash, as the bytes of its file.

    `indent` is for those that people read: it takes ten times as long.
    """
    # As a reader will see it: JSON has no tuples and no keys but strings.
    plain = json.loads(canonical(manifest))
    whole = {**plain, SEAL: digest(plain)}
    return (json.dumps(whole, indent=indent, sort_keys=True, allow_nan=False) + "\n").encode()


def read_sealed(storage: Storage, key: str, kind: str) -> dict[str, Any]:
    """The manifest of the folder `key`, of the format `kind`. Raises Damaged."""
    data = _read(storage, key, MANIFEST)
    try:
        manifest = json.loads(data)
        seal = manifest.pop(SEAL)
        whole = seal == digest(manifest)
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(MANIFEST, "is not what its sha256 says")
    if manifest.get("format") != kind:
        raise Damaged(MANIFEST, f"has the format {manifest.get('format')!r}, not {kind!r}")
    return dict(manifest)


def read_file(storage: Storage, key: str, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file of the folder `key`, verified. Raises Damaged."""
    data = _read(storage, key, entry["path"])
    _compare(entry, len(data), hashlib.sha256(data).hexdigest())
    return data


def verify_file(storage: Storage, key: str, entry: Mapping[str, Any]) -> None:
    """The same without holding the file in memory. Raises Damaged."""
    hashed, size = hashlib.sha256(), 0
    try:
        with storage.open(f"{key}/{entry['path']}") as file:
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise _damaged(entry["path"], error) from error
    _compare(entry, size, hashed.hexdigest())


def _read(storage: Storage, key: str, name: str) -> bytes:
    try:
        data = storage.read(f"{key}/{name}")
    except OSError as error:
        raise _damaged(name, error) from error
    if data is None:
        raise Damaged(name, "is missing")
    return data


def _compare(entry: Mapping[str, Any], size: int, sha256: str) -> None:
    if size != entry["size_bytes"]:
        raise Damaged(entry["path"], f"has {size} bytes instead of {entry['size_bytes']}")
    if sha256 != entry["sha256"]:
        raise Damaged(entry["path"], "is not what its sha256 says")


def _damaged(name: str, error: OSError) -> Exception:
    """A file that lacks, or a place on the disk that cannot be read; any other error is not the file's."""
    if isinstance(error, FileNotFoundError):
        return Damaged(name, "is missing")
    if error.errno == errno.EIO:
        return Damaged(name, "cannot be read")
    return error
