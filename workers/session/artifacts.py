"""Saving an adapter: a plain PEFT folder with a manifest, written aside, read back, then moved in place."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import SignalError
from workers.engine.info import versions
from workers.engine.trainer import Trainer
from workers.storage import Storage, artifact_key

MANIFEST = "manifest.json"


def save_adapter(
    storage: Storage, trainer: Trainer, name: str, mode: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the adapter under `name` and return its manifest.

    Raises SignalError name_taken when another operation saved under this name, storage_full when
    the disk is full; either leaves nothing behind.
    """
    key = artifact_key(facts["run_id"], name)
    existing = storage.read(f"{key}/{MANIFEST}")
    if existing is not None:
        return _same_operation(json.loads(existing), name, facts["seq"])
    folder = storage.scratch()
    try:
        trainer.export_adapter(folder, facts["base_model"])
        manifest = _manifest(folder, name, mode, trainer.step, facts)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        storage.put_folder(key, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _same_operation(manifest: dict[str, Any], name: str, seq: int) -> dict[str, Any]:
    # A worker that died between the move and the commit finds its own folder when the operation is
    # executed again.
    if manifest["seq"] == seq:
        return manifest
    raise SignalError(
        "name_taken",
        f"The run already has an artifact {name!r}, saved at seq {manifest['seq']}.",
        param="name",
    )


def _manifest(
    folder: Path, name: str, mode: str, step: int, facts: dict[str, Any]
) -> dict[str, Any]:
    files = [_describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "format": "signal-artifact/1",
        "name": name,
        "mode": mode,
        "run_id": facts["run_id"],
        "seq": facts["seq"],
        "step": step,
        "base_model": facts["base_model"],
        "config": facts["config"],
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "versions": versions(),
        "files": files,
        "total_size_bytes": sum(file["size_bytes"] for file in files),
    }


def _describe(folder: Path, path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "path": path.relative_to(folder).as_posix(),
        "size_bytes": path.stat().st_size,
        "sha256": digest,
    }
