"""Where a run's snapshots are and which of them are kept: names, listings and pure rules, torch-free."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.storage.protocol import MANIFEST, FileInfo, Storage

_NAME = re.compile(r"(\d{12})-(\d{6})-[0-9a-f]{8}")
NEWEST = 2


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot as a listing shows it; `modified_at` in epoch seconds."""

    key: str
    seq: int
    epoch: int
    size_bytes: int
    modified_at: float

    @property
    def order(self) -> tuple[int, int, float, str]:
        """What newer means: a later seq; of one seq, a later epoch; of one epoch, written later."""
        return self.seq, self.epoch, self.modified_at, self.key


def snapshots_key(run_id: str) -> str:
    """Where all snapshots of a run are."""
    return f"runs/{run_id}/snapshots"


def new_snapshot_key(run_id: str, seq: int, epoch: int) -> str:
    """A name that no other snapshot has: two workers may write the same place at once."""
    return f"{snapshots_key(run_id)}/{seq:012d}-{epoch:06d}-{secrets.token_hex(4)}"


def place_of(key: str) -> tuple[int, int] | None:
    """(seq, epoch) of a snapshot's key, or None when it is none."""
    found = _NAME.fullmatch(key.rpartition("/")[2])
    return (int(found[1]), int(found[2])) if found else None


def snapshot_infos(storage: Storage, run_id: str) -> list[SnapshotInfo]:
    """The run's whole snapshots, newest first."""
    folders = snapshot_folders(storage, run_id)
    found = [info for key, files in folders.items() if (info := _info(key, files)) is not None]
    return sorted(found, key=lambda info: info.order, reverse=True)


def snapshot_info(storage: Storage, key: str) -> SnapshotInfo | None:
    """One snapshot, or None when it is not whole."""
    return _info(key, storage.list(key))


def snapshot_folders(storage: Storage, run_id: str) -> dict[str, list[FileInfo]]:
    """The files below every snapshot's key, also of those that were never finished."""
    base = snapshots_key(run_id)
    folders: dict[str, list[FileInfo]] = {}
    for file in storage.list(base):
        key = f"{base}/{file.key[len(base) + 1 :].partition('/')[0]}"
        if place_of(key) is not None:
            folders.setdefault(key, []).append(file)
    return folders


def to_keep(
    infos: Iterable[SnapshotInfo], *, every: int, now: float, history_s: float, history_bytes: int
) -> list[SnapshotInfo]:
    """What stays, newest first: the two newest whatever they are, and the history behind them.

    Of the history the oldest snapshot in each `every` seqs stays, so that one which was kept once is kept
    until it is older than `history_s` or all that is kept would exceed `history_bytes`: then it goes with all
    that is older still.
    """
    ordered = sorted(infos, key=lambda info: info.order, reverse=True)
    kept, rest = ordered[:NEWEST], ordered[NEWEST:]
    used = sum(info.size_bytes for info in kept)
    for info in _one_in_each(rest, every):
        used += info.size_bytes
        if used > history_bytes or now - info.modified_at > history_s:
            break
        kept.append(info)
    return kept


def _one_in_each(ordered: Sequence[SnapshotInfo], every: int) -> list[SnapshotInfo]:
    """Of snapshots from the newest to the oldest, the oldest of each group of `every` seqs."""
    oldest = {info.seq // every: info for info in ordered}
    return list(oldest.values())


def _info(key: str, files: list[FileInfo]) -> SnapshotInfo | None:
    place = place_of(key)
    manifest = next((file for file in files if file.key == f"{key}/{MANIFEST}"), None)
    if place is None or manifest is None:
        return None
    size = sum(file.size for file in files)
    return SnapshotInfo(key, *place, size, manifest.modified_at)
