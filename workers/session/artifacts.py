"""Saved states: a plain PEFT folder with a manifest, written aside, then moved in place; and loading them.

Of the mode "adapter" it holds the weights; of the mode "state" also optimizer.safetensors, with which
training goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import SignalError
from workers.canonical import digest
from workers.engine import export
from workers.engine.info import versions
from workers.engine.state import WEIGHTS, TrainerState, copies, mismatch
from workers.engine.trainer import Trainer
from workers.session.tensor_file import read_tensors, write_tensors
from workers.storage import Storage, artifact_key
from workers.storage.manifest import Damaged, describe, read_file, read_sealed, sealed
from workers.storage.protocol import MANIFEST

OPTIMIZER = "optimizer.safetensors"
FORMAT = "signal-artifact/1"
_FACTS = "signal"


def save_adapter(
    storage: Storage, trainer: Trainer, name: str, mode: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the adapter, and in the mode "state" its optimizer, under `name`; the manifest.

    Raises SignalError name_taken when another operation saved under this name, storage_full when
    the disk is full; either leaves nothing behind.
    """
    key = artifact_key(facts["run_id"], name)
    existing = _stored(storage, key)
    if existing is not None:
        return _same_operation(existing, name, facts)
    folder = storage.scratch(trainer.adapter.master.nbytes)
    try:
        trainer.export_adapter(folder, facts["base_model"])
        if mode == "state":
            _write_optimizer(folder, trainer)
        manifest = sealed(_manifest(folder, name, mode, trainer.step, facts), indent=2)
        (folder / MANIFEST).write_bytes(manifest)
        storage.put_folder(key, folder)
    except FileExistsError:
        # A worker whose lease has ended saved it a moment earlier.
        existing = _stored(storage, key)
        if existing is None:
            raise
        return _same_operation(existing, name, facts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return dict(json.loads(manifest))


def load_artifact(
    storage: Storage, key: str, trainer: Trainer, *, optimizer: bool, sha256: str | None = None
) -> dict[str, Any]:
    """Make `trainer` go on from the artifact under `key`; the artifact's manifest.

    `sha256` is the seal of the manifest that was meant when the operation was accepted. With `optimizer`
    moments and steps are the saved ones, without it they begin at 0. Gradients that were accumulated are
    discarded. Raises SignalError not_found, or state_mismatch that names the file, the
    field or the tensor which does not fit; either changes nothing.
    """
    manifest, files = read_verified(storage, key)
    if sha256 is not None and digest(manifest) != sha256:
        raise mismatch("another one was saved under its name meanwhile")
    names = export.file_names(trainer.adapter)
    for name in names:
        if name not in files:
            raise mismatch(f"it has no {name}")
    tensors = read_tensors(files[names[1]])[0]
    weights = export.import_adapter(trainer.adapter, json.loads(files[names[0]]), tensors)
    if not optimizer:
        trainer.restore_weights(weights)
        return manifest
    if OPTIMIZER not in files:
        raise mismatch(f"it has no {OPTIMIZER}, being saved with the mode {manifest['mode']!r}")
    moments, metadata = read_tensors(files[OPTIMIZER])
    facts = {**json.loads(metadata.get(_FACTS, "{}")), "accumulation": None}
    trainer.restore(TrainerState({WEIGHTS: weights, **moments}, facts))
    return manifest


def read_verified(storage: Storage, key: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of an artifact, and every file by its path.

    Raises SignalError not_found, or state_mismatch that names the damaged file.
    """
    if storage.stat(f"{key}/{MANIFEST}") is None:
        raise SignalError("not_found", "There is no such artifact, or it was deleted.")
    try:
        manifest = read_sealed(storage, key, FORMAT)
        files = {one["path"]: read_file(storage, key, one) for one in manifest["files"]}
    except Damaged as damage:
        raise mismatch(str(damage)) from damage
    return manifest, files


def _write_optimizer(folder: Path, trainer: Trainer) -> None:
    tensors, facts = trainer.optimizer.state()
    # The moments lie in the order of the weights, which the layout names.
    described = json.dumps({"layout": trainer.adapter.layout, "optimizer": facts}, sort_keys=True)
    write_tensors(folder / OPTIMIZER, copies(tensors), {"format": "pt", _FACTS: described})


def _stored(storage: Storage, key: str) -> dict[str, Any] | None:
    data = storage.read(f"{key}/{MANIFEST}")
    return None if data is None else dict(json.loads(data))


def _same_operation(manifest: dict[str, Any], name: str, facts: dict[str, Any]) -> dict[str, Any]:
    # A worker that died between the move and the commit finds its own folder when the operation is
    # executed again. After a rollback another operation may have its seq, but never its tag.
    own = ("seq", "operation")
    if all(manifest.get(field) == facts.get(field) for field in own):
        return manifest
    raise SignalError(
        "name_taken",
        f"The run already has an artifact {name!r}, saved at seq {manifest['seq']}.",
        param="name",
    )


def _manifest(
    folder: Path, name: str, mode: str, step: int, facts: dict[str, Any]
) -> dict[str, Any]:
    files = [describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "format": FORMAT,
        "name": name,
        "mode": mode,
        "run_id": facts["run_id"],
        "seq": facts["seq"],
        "operation": facts.get("operation"),
        "step": step,
        "base_model": facts["base_model"],
        "config": facts["config"],
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "versions": versions(),
        "files": files,
        "total_size_bytes": sum(file["size_bytes"] for file in files),
    }
