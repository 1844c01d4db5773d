"""The models that the operator has named: names to folders.

Clients send names only; a name that is not in the catalogue's file is refused, so no path from a request
reaches the disk. Touches `models.json`, the model folders (reads) and, where the operator allows it, the
model hub.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from schemas.errors import SignalError
from workers.model_folder import CONFIG, ModelEntry, ModelFolderError, read_model_folder
from workers.settings import Settings

__all__ = ["Catalogue", "ModelEntry", "ModelFolderError", "TokenizerFile"]

log = logging.getLogger(__name__)

MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Weights, configuration and tokenizer from the top of a hub's repository: never code, never pickles.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")


@dataclass(frozen=True)
class TokenizerFile:
    """A file that a client needs to tokenize by itself; `content` is its text."""

    name: str
    size_bytes: int
    sha256: str
    content: str


class Catalogue:
    """Names to models. Cheap to ask: the file is read again only when it has changed."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.models_file
        self._downloads = settings.data_dir / "models"
        self._allow_hub = settings.allow_hub
        self._read_at: tuple[int, ...] | None = None
        self._rows: dict[str, dict[str, Any]] = {}

    def names(self) -> list[str]:
        """The names, in the order in which the operator gave them."""
        return list(self._current())

    def entry(self, name: str) -> ModelEntry:
        """The model of that name.

        Raises SignalError("unknown_model"), or "model_load_failed" when its folder is gone or broken.
        """
        row = self._current().get(name)
        if row is None:
            raise SignalError(
                "unknown_model",
                "No model of that name: GET /models lists the names that this server knows.",
                param="base_model",
            )
        try:
            return _entry(name, self._folder(row))
        except (ModelFolderError, OSError) as error:
            # The reason names a path of the server, which is the operator's affair.
            log.error("model %s cannot be used: %s", name, error)
            raise SignalError(
                "model_load_failed",
                f"The files of {name} on the server cannot be used: ask its operator.",
                param="base_model",
            ) from error

    def entries(self) -> list[ModelEntry]:
        """Every model that can be used; one whose folder is broken is left out and logged."""
        found = []
        for name in self.names():
            try:
                found.append(self.entry(name))
            except SignalError:
                continue
        return found

    def tokenizer_files(self, name: str) -> list[TokenizerFile]:
        """The model's tokenizer, file by file. Raises as `entry` does."""
        folder = self.entry(name).path
        files = [folder / file for file in _TOKENIZER_FILES]
        return [_tokenizer_file(file, _changed_at(file)) for file in files if file.is_file()]

    def add(self, name: str, path: Path | str) -> ModelEntry:
        """Name the model in the folder `path`, or name another one so. For the operator's commands.

        Raises ModelFolderError when the name or the folder cannot be used.
        """
        return self._add(name, Path(path).expanduser().resolve(), {})

    def add_hub(self, name: str, hub_id: str) -> ModelEntry:
        """Download a model from the hub into the data folder and name it. Raises ModelFolderError."""
        _check_name(name)
        if not self._allow_hub:
            raise ModelFolderError(
                f"{hub_id} is a hub id, and downloads are off: set SIGNAL_ALLOW_HUB=1 or give a folder"
            )
        if not _NAME.fullmatch(hub_id) or ".." in hub_id:
            raise ModelFolderError(f"{hub_id!r} is not a hub id, such as owner/model")
        folder = self._downloads / hub_id.replace("/", "--")
        _download(hub_id, folder)
        return self._add(name, folder.resolve(), {"hub_id": hub_id})

    def remove(self, name: str) -> None:
        """Forget a name; its folder stays. Raises KeyError for an unknown one."""
        with self._changing() as rows:
            del rows[name]

    def _add(self, name: str, folder: Path, origin: dict[str, str]) -> ModelEntry:
        # Imported here: the tokenizers package is not needed to look a model up.
        from workers.text.tokenizer import load_tokenizer

        _check_name(name)
        entry = read_model_folder(name, folder)
        try:
            load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise ModelFolderError(str(error)) from error
        added_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._changing() as rows:
            rows[name] = {"name": name, "path": str(folder), **origin, "added_at": added_at}
        return entry

    def _folder(self, row: dict[str, Any]) -> Path:
        return self._file.parent / str(row["path"])

    def _current(self) -> dict[str, dict[str, Any]]:
        try:
            facts = self._file.stat()
        except FileNotFoundError:
            return {}
        read_at = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        if read_at != self._read_at:
            rows = _read_rows(self._file)
            # Both at once matters little: a thread between the two reads the same file once more.
            self._rows, self._read_at = rows, read_at
        return self._rows

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The rows to change, written back whole; two commands at a time take turns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.with_name(self._file.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = _read_rows(self._file) if self._file.exists() else {}
            yield rows
            _write_rows(self._file, rows)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name or len(name) > MAX_NAME:
        raise ModelFolderError(
            f"{name!r} cannot name a model: use A-Z a-z 0-9 . _ - and at most one /, up to {MAX_NAME} "
            "characters, each part beginning with a letter or digit"
        )


def _read_rows(file: Path) -> dict[str, dict[str, Any]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["models"]
        return {row["name"]: row for row in listed if row["path"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f'{file} must hold {{"models": [{{"name": …, "path": …}}]}}: {error!r}'
        ) from None


def _write_rows(file: Path, rows: dict[str, dict[str, Any]]) -> None:
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    text = json.dumps({"models": list(rows.values())}, indent=2) + "\n"
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    staging.replace(file)


def _entry(name: str, folder: Path) -> ModelEntry:
    return _cached_entry(name, folder, (folder / CONFIG).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _cached_entry(name: str, folder: Path, changed_at: int) -> ModelEntry:
    return read_model_folder(name, folder)


def _changed_at(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=64)
def _tokenizer_file(file: Path, changed_at: int) -> TokenizerFile:
    raw = file.read_bytes()
    return TokenizerFile(
        name=file.name,
        size_bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        content=raw.decode("utf-8"),
    )


def _download(hub_id: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            hub_id, local_dir=folder, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]
        )
    except Exception as error:
        # The hub's client raises a dozen kinds of its own and of its HTTP library.
        raise ModelFolderError(f"{hub_id} could not be downloaded: {error}") from error
