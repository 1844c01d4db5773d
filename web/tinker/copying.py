"""Copies of checkpoints, each in a session and a model of its own that cannot be trained on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import SignalError
from web.context import services, user
from web.runs.access import runs
from web.tinker import checkpoints, models, sessions
from web.tinker.checkpoints import Checkpoint
from workers.storage import artifact_key
from workers.storage.protocol import MANIFEST

_SEQ = 1


def copy(request: Mapping[str, Any], key: str | None) -> str:
    """The path of the copy; a repeat under the same key makes none anew. Raises SignalError."""
    source = checkpoints.find(request["source_path"], "source_path")
    mark = f"{user().id}|{key}|{request['source_path']}" if key else None
    model_id = _model(request, source, mark)
    run_id, row = models.run_id_of(model_id), source.row
    artifact = checkpoints.note(
        run_id, row.kind, row.name, _SEQ,
        ttl_seconds=request["ttl_seconds"], user_metadata=row.user_metadata,
    )  # fmt: skip
    _copy_files(source, artifact_key(run_id, artifact))
    services().journal.close(run_id, "completed")
    runs().note_closed(run_id, "completed", None)
    return f"{checkpoints.SCHEME}{model_id}/{row.kind}/{row.name}"


def _model(request: Mapping[str, Any], source: Checkpoint, mark: str | None) -> str:
    db, who = services().db, user().id
    session_id, number = request["session_id"], request["model_seq_id"]
    if session_id is None:
        about = {"project_id": request["destination_project_id"], "copy_of": source.path}
        session_id, number = sessions.create(db, who, about, _name(mark)), 0
    elif number is None:
        raise SignalError("validation_error", "It goes with session_id.", param="model_seq_id")
    asked = {"session_id": session_id, "model_seq_id": number, "base_model": None}
    return models.create_from(
        {**asked, "optimizer": False, "path": source.path, "user_metadata": None}, source
    )


def _name(mark: str | None) -> str | None:
    return None if mark is None else hashlib.sha256(mark.encode()).hexdigest()[:16]


def _copy_files(source: Checkpoint, key: str) -> None:
    storage = services().storage
    if storage.stat(f"{key}/{MANIFEST}") is not None:
        return
    manifest = source.saved().manifest
    folder = storage.scratch(manifest["total_size_bytes"])
    try:
        for path in (*(one["path"] for one in manifest["files"]), MANIFEST):
            _fetch(f"{source.key}/{path}", folder / path)
        storage.put_folder(key, folder)
    except FileExistsError:
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(key: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with services().storage.open(key) as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
