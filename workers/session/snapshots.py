"""A run's snapshots in storage: written aside, put in place, read back; a damaged one is never loaded.

A snapshot is a folder of `state.safetensors` and `manifest.json`, which holds the facts, the size and
sha256 of every file, and its own. Which snapshots there are and which are kept is in
`workers.storage.snapshot_keys`, which needs no torch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from schemas.errors import SignalError
from workers import failpoints
from workers.engine.info import versions
from workers.engine.state import TrainerState
from workers.session.tensor_file import read_tensors, write_tensors
from workers.storage import Storage
from workers.storage.aside import full_disk_is_named
from workers.storage.manifest import Damaged, read_file, read_sealed, sealed, verify_file
from workers.storage.protocol import MANIFEST
from workers.storage.snapshot_keys import (
    SnapshotInfo,
    new_snapshot_key,
    place_of,
    snapshot_folders,
    snapshot_info,
    snapshot_infos,
    to_keep,
)

__all__ = ["Loaded", "SnapshotInfo", "Snapshots", "to_keep"]

log = logging.getLogger(__name__)

FORMAT = "signal-snapshot/1"
TENSORS = "state.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A snapshot in memory; `damaged` are the (key, file) of newer ones that had to be passed over."""

    info: SnapshotInfo
    state: TrainerState
    facts: dict[str, Any]
    damaged: tuple[tuple[str, str], ...] = ()


class Snapshots:
    """The snapshots of one run."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        """Touches nothing."""
        self.storage, self.run_id = storage, run_id

    def write(self, state: TrainerState, facts: Mapping[str, Any]) -> SnapshotInfo:
        """Store `state` with `facts`: plain JSON that holds at least `seq` and `epoch`.

        Returns when it is durable and has been read back. On any error nothing of it is left. Raises
        SignalError storage_full, snapshot_damaged (what was read back is not what was written), or an
        OSError.
        """
        key = new_snapshot_key(self.run_id, facts["seq"], facts["epoch"])
        with full_disk_is_named():
            folder = self.storage.scratch(sum(tensor.nbytes for tensor in state.tensors.values()))
            try:
                files = self._fill(folder, state, facts)
                return self._place(key, folder, files)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def infos(self) -> list[SnapshotInfo]:
        """The whole snapshots by a listing, newest first; none is read."""
        return snapshot_infos(self.storage, self.run_id)

    def load(self, info: SnapshotInfo) -> tuple[TrainerState, dict[str, Any]]:
        """The state, and the facts it was written with, every file verified.

        Raises SignalError snapshot_damaged whose message, and `file` in its data, name the file.
        """
        try:
            manifest = self._manifest(info.key)
            (entry,) = manifest["files"]
            tensors = _tensors(entry["path"], read_file(self.storage, info.key, entry))
        except Damaged as damage:
            raise _damaged(info.key, damage) from damage
        return TrainerState(tensors, manifest["state"]), manifest["facts"]

    def newest_good(self, at_most: int | None = None) -> Loaded | None:
        """The newest undamaged snapshot of a seq of at most `at_most`; None when there is none."""
        damaged: list[tuple[str, str]] = []
        for info in self.infos():
            if at_most is not None and info.seq > at_most:
                continue
            try:
                state, facts = self.load(info)
            except SignalError as error:
                log.warning("a snapshot of %s is passed over: %s", self.run_id, error.message)
                damaged.append((info.key, error.data["file"]))
                continue
            return Loaded(info, state, facts, tuple(damaged))
        return None

    def prune(self, keep: Collection[str]) -> None:
        """Delete all but the keys in `keep`, unfinished ones too.

        What is newer than everything in `keep` stays: another worker has written it, or is about to,
        since the caller looked.
        """
        newest = max((place_of(key) or (0, 0) for key in keep), default=None)
        for key in snapshot_folders(self.storage, self.run_id):
            place = place_of(key)
            if key not in keep and (newest is None or place is None or place <= newest):
                self.storage.delete(key)

    def _fill(
        self, folder: Path, state: TrainerState, facts: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Write both files; the manifest's entries."""
        failpoints.hit("snapshot.filling")
        files = [write_tensors(folder / TENSORS, state.tensors, {"format": "pt"})]
        failpoints.hit("snapshot.tensors")
        manifest = {
            "format": FORMAT,
            "run_id": self.run_id,
            "facts": dict(facts),
            "state": state.facts,
            "files": files,
            "versions": versions(),
        }
        (folder / MANIFEST).write_bytes(sealed(manifest))
        return files

    def _place(self, key: str, folder: Path, files: list[dict[str, Any]]) -> SnapshotInfo:
        """Move the folder to `key` and read it back; after any error nothing is there."""
        try:
            failpoints.hit("snapshot.renaming")
            self.storage.put_folder(key, folder)
            failpoints.hit("snapshot.renamed")
            return self._verified(key, files)
        except FileExistsError:
            raise  # what is there is another's
        except Damaged as damage:
            self._discard(key)
            raise _damaged(key, damage) from damage
        except BaseException:
            self._discard(key)
            raise

    def _verified(self, key: str, files: list[dict[str, Any]]) -> SnapshotInfo:
        if self._manifest(key)["files"] != files:
            raise Damaged(MANIFEST, "is not what was written")
        for entry in files:
            verify_file(self.storage, key, entry)
        info = snapshot_info(self.storage, key)
        if info is None:
            raise Damaged(MANIFEST, "is missing")
        return info

    def _discard(self, key: str) -> None:
        try:
            self.storage.delete(key)
        except (OSError, SignalError) as error:
            # A later prune finds it.
            log.warning("the unfinished snapshot %s is not deleted: %s", key, error)

    def _manifest(self, key: str) -> dict[str, Any]:
        """Raises Damaged, also when the manifest is another snapshot's."""
        manifest = read_sealed(self.storage, key, FORMAT)
        facts = manifest["facts"]
        if (manifest["run_id"], (facts["seq"], facts["epoch"])) != (self.run_id, place_of(key)):
            raise Damaged(MANIFEST, "is another snapshot's")
        return manifest


def _tensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return read_tensors(data)[0]
    except ValueError as error:
        raise Damaged(name, "cannot be understood") from error


def _damaged(key: str, damage: Damaged) -> SignalError:
    seq = (place_of(key) or (0, 0))[0]
    return SignalError(
        "snapshot_damaged",
        f"The snapshot of seq {seq} is damaged: {damage}.",
        data={"key": key, "file": damage.file},
    )
