"""Names of snapshots, listings of them, and which are kept: a pure rule, held for any history."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from workers.storage import LocalStorage
from workers.storage.snapshot_keys import (
    NEWEST,
    SnapshotInfo,
    new_snapshot_key,
    place_of,
    snapshot_info,
    snapshot_infos,
    to_keep,
)

NOW = 1_000_000.0
FOREVER, UNLIMITED = 1e9, 10**18


def _info(seq: int, epoch: int = 1, size: int = 100, age: float = 0.0) -> SnapshotInfo:
    key = new_snapshot_key("run_1", seq, epoch)
    return SnapshotInfo(key, seq, epoch, size, NOW - age)


def _seqs(infos: list[SnapshotInfo]) -> list[int]:
    return [info.seq for info in infos]


def _kept(
    infos: list[SnapshotInfo],
    every: int = 10,
    history_s: float = FOREVER,
    history_bytes: int = UNLIMITED,
) -> list[SnapshotInfo]:
    return to_keep(infos, every=every, now=NOW, history_s=history_s, history_bytes=history_bytes)


histories = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 3), st.integers(0, 1000), st.floats(0, 1e6)).map(
        lambda values: _info(*values)
    ),
    max_size=40,
)


def test_a_name_says_its_place() -> None:
    key = new_snapshot_key("run_1", 7, 3)
    assert key.startswith("runs/run_1/snapshots/000000000007-000003-") and place_of(key) == (7, 3)
    assert new_snapshot_key("run_1", 7, 3) != key
    for other in ("runs/run_1/snapshots", f"{key}x", key[:-1], f"{key}/manifest.json", ""):
        assert place_of(other) is None


def test_a_listing_needs_manifests_and_no_torch(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    whole, torn = new_snapshot_key("run_1", 5, 1), new_snapshot_key("run_1", 6, 1)
    storage.write(f"{whole}/state.safetensors", bytes(10))
    storage.write(f"{whole}/manifest.json", b"{}")
    storage.write(f"{torn}/state.safetensors", bytes(10))
    (info,) = snapshot_infos(storage, "run_1")
    assert (info.key, info.seq, info.epoch, info.size_bytes) == (whole, 5, 1, 12)
    assert snapshot_info(storage, whole) == info and snapshot_info(storage, torn) is None
    assert snapshot_infos(storage, "run_2") == []
    script = "import sys, workers.storage.snapshot_keys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_two_newest_and_one_in_each_group() -> None:
    infos = [_info(seq) for seq in range(0, 45, 3)]
    assert _seqs(_kept(infos)) == [42, 39, 30, 21, 12, 0]
    assert _seqs(_kept(infos[:2])) == [3, 0]
    assert _kept([]) == []


def test_of_one_seq_the_later_epoch_is_newer() -> None:
    infos = [_info(9, 2), _info(9, 3), _info(9, 1)]
    assert [info.epoch for info in _kept(infos)][:2] == [3, 2]


def test_history_ends_by_age_or_by_size() -> None:
    infos = [_info(seq, size=100, age=1000 - seq) for seq in range(0, 100, 10)]
    assert _seqs(_kept(infos, history_s=950)) == [90, 80, 70, 60, 50]
    assert _seqs(_kept(infos, history_bytes=500)) == [90, 80, 70, 60, 50]
    # The two newest stay whatever they are.
    assert _seqs(_kept(infos, history_s=0.1, history_bytes=1)) == [90, 80]


@given(histories, st.integers(1, 50), st.floats(1, 1e6), st.integers(0, 20_000))
def test_the_rule_holds_for_any_history(
    infos: list[SnapshotInfo], every: int, history_s: float, history_bytes: int
) -> None:
    kept = _kept(infos, every, history_s, history_bytes)
    newest_first = sorted(infos, key=lambda info: info.order, reverse=True)
    assert kept == [info for info in newest_first if info in kept]
    assert kept[:NEWEST] == newest_first[:NEWEST]
    history = kept[NEWEST:]
    assert all(NOW - info.modified_at <= history_s for info in history)
    assert not history or sum(info.size_bytes for info in kept) <= history_bytes
    groups = [info.seq // every for info in history]
    assert len(set(groups)) == len(groups)
    assert _kept(kept, every, history_s, history_bytes) == kept


@given(st.sets(st.integers(0, 300), max_size=60), st.integers(1, 50))
def test_pruning_after_every_snapshot_keeps_the_same_as_once_at_the_end(
    seqs: set[int], every: int
) -> None:
    infos = [_info(seq) for seq in sorted(seqs)]
    kept: list[SnapshotInfo] = []
    for info in infos:
        kept = _kept([*kept, info], every)
    assert kept == _kept(infos, every)
