"""Files from the server: artifacts and tokenizers, each checked against its sha256.

A file appears under its name only when it is whole and right; a broken connection goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

from rewardsignal._exceptions import SignalAPIError
from rewardsignal._schemas import Artifact, ArtifactFile, TokenizerFiles
from rewardsignal._transport import Transport


def download_artifact(transport: Transport, artifact: Artifact, folder: Path) -> Path:
    """Download every file of an artifact into `folder`; what is there already and right is kept."""
    for file in artifact.files:
        target = inside(folder, file.path)
        if not (target.is_file() and _sha256(target) == file.sha256):
            _fetch(transport, file, target)
    return folder


def write_tokenizer(files: TokenizerFiles, folder: Path) -> Path:
    """Write a tokenizer's files into `folder`."""
    for file in files.files:
        target = inside(folder, file.name)
        content = file.content.encode()
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise _damaged(file.name)
        part = _part(target)
        part.write_bytes(content)
        os.replace(part, target)
    return folder


def inside(folder: Path, name: str) -> Path:
    """The place of a file below `folder`; its parent is made. Raises SignalAPIError outside of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in name:
        raise SignalAPIError(f"The server named a file outside of the folder: {name!r}")
    target = folder.joinpath(*pure.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _fetch(transport: Transport, file: ArtifactFile, target: Path) -> None:
    part = _part(target)
    part.unlink(missing_ok=True)
    attempt, until = 0, transport.retry_until()
    while True:
        try:
            _append(transport, file, part)
            break
        except SignalAPIError as error:
            transport.pause(error, attempt, until)
        attempt += 1
    if _sha256(part) != file.sha256:
        part.unlink()
        raise _damaged(file.path)
    os.replace(part, target)


def _append(transport: Transport, file: ArtifactFile, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have and have == file.size_bytes:
        return
    with (
        transport.stream(file.url, have) as response,
        # 200 to a range request is the whole file.
        part.open("ab" if response.status_code == 206 else "wb") as out,
    ):
        for chunk in response.iter_bytes():
            out.write(chunk)


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(name: str) -> SignalAPIError:
    return SignalAPIError(f"{name} arrived damaged: its sha256 is not the server's. Try again.")
