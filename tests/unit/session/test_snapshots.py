"""Snapshots: whole or not there, never taken for what they are not, and the one before is used instead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from schemas.errors import SignalError
from tests.support.disk import filled, small_disk
from tests.unit.session.faulty import Broken, Faulty, OneByOne, full_disk
from workers.engine.certificate import certificate
from workers.engine.trainer import Trainer
from workers.session.snapshots import SnapshotInfo, Snapshots
from workers.storage import LocalStorage, Storage
from workers.storage.protocol import StorageAway

Make = Callable[..., Trainer]
RUN = "run_1"
FILES = ["manifest.json", "state.safetensors"]


def _facts(seq: int, epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"seq": seq, "epoch": epoch, "entries": seq + 3, "owner": "ä", "lr": 0.1 + 0.2, **more}


def _path(storage: LocalStorage, info: SnapshotInfo, file: str) -> Path:
    return storage.root / info.key / file


def _keys(storage: LocalStorage) -> list[str]:
    return [file.key for file in storage.list(f"runs/{RUN}")]


def _left_aside(storage: LocalStorage) -> list[Path]:
    """Files that a failed write left outside of the keys; a lock of the process is no such file."""
    return [path for path in storage.root.glob(".aside/*/*") if path.is_dir()]


def test_what_is_written_is_loaded_bit_for_bit(storage: LocalStorage, trained: Make) -> None:
    run, snapshots = trained(), Snapshots(storage, RUN)
    info = snapshots.write(run.capture(), _facts(7, 3))
    assert (info.seq, info.epoch) == (7, 3)
    assert info.key.startswith(f"runs/{RUN}/snapshots/000000000007-000003-")
    assert snapshots.infos() == [info]
    assert info.size_bytes == sum(file.size for file in storage.list(info.key))
    assert sorted(_keys(storage)) == [f"{info.key}/{file}" for file in FILES]
    state, facts = snapshots.load(info)
    assert facts == _facts(7, 3)
    assert certificate(state) == certificate(run.capture())
    other = trained(seed=8)
    other.restore(state)
    assert certificate(other.capture()) == certificate(run.capture())
    assert not _left_aside(storage)


def test_any_reader_of_safetensors_reads_it(storage: LocalStorage, trained: Make) -> None:
    state = trained().capture()
    info = Snapshots(storage, RUN).write(state, _facts(1))
    theirs = load_file(_path(storage, info, "state.safetensors"))
    assert theirs.keys() == state.tensors.keys()
    assert all(theirs[name].equal(tensor) for name, tensor in state.tensors.items())


def test_newest_first_and_at_most(storage: LocalStorage, trained: Make) -> None:
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    for seq, epoch in ((5, 1), (20, 1), (20, 2), (9, 3)):
        snapshots.write(state, _facts(seq, epoch))
    assert [(i.seq, i.epoch) for i in snapshots.infos()] == [(20, 2), (20, 1), (9, 3), (5, 1)]
    for at_most, expected in ((None, 20), (20, 20), (19, 9), (8, 5)):
        loaded = snapshots.newest_good(at_most)
        assert loaded is not None and (loaded.info.seq, loaded.damaged) == (expected, ())
    assert snapshots.newest_good(4) is None
    assert Snapshots(storage, "run_2").newest_good() is None


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _damages(state: Path, manifest: Path) -> list[tuple[str, Callable[[], Any]]]:
    text = manifest.read_text()
    return [
        ("state.safetensors", lambda: _flip(state, -1)),
        ("state.safetensors", lambda: _flip(state, 20)),
        ("state.safetensors", lambda: os.truncate(state, state.stat().st_size // 2)),
        ("state.safetensors", lambda: os.truncate(state, 0)),
        ("state.safetensors", lambda: state.write_bytes(state.read_bytes() + b"\0")),
        ("state.safetensors", state.unlink),
        ("manifest.json", lambda: os.truncate(manifest, len(text) // 2)),
        ("manifest.json", lambda: os.truncate(manifest, 0)),
        ("manifest.json", lambda: manifest.write_text(text.replace('"steps": 2', '"steps": 3'))),
        ("manifest.json", lambda: manifest.write_text(text.replace('"seq": 2', '"seq": 3'))),
        ("manifest.json", lambda: manifest.write_text("[]")),
        ("manifest.json", lambda: manifest.write_text("{}")),
    ]


@pytest.mark.parametrize("case", range(12))
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_used(
    storage: LocalStorage, trained: Make, case: int
) -> None:
    run, snapshots = trained(), Snapshots(storage, RUN)
    good = snapshots.write(run.capture(), _facts(1))
    expected = certificate(run.capture())
    run.optim_step()
    bad = snapshots.write(run.capture(), _facts(2))
    paths = [_path(storage, bad, name) for name in reversed(FILES)]
    file, damage = _damages(paths[0], paths[1])[case]
    damage()
    with pytest.raises(SignalError, match=file.replace(".", r"\.")) as caught:
        snapshots.load(bad)
    assert caught.value.code == "snapshot_damaged"
    assert caught.value.data == {"key": bad.key, "file": file}
    loaded = snapshots.newest_good()
    assert loaded is not None and loaded.info == good and loaded.facts == _facts(1)
    assert certificate(loaded.state) == expected
    assert loaded.damaged == ((bad.key, file),)


def test_a_flipped_byte_of_a_manifest_is_noticed_or_harmless(
    storage: LocalStorage, trained: Make
) -> None:
    snapshots = Snapshots(storage, RUN)
    info = snapshots.write(trained(targets=("q_proj",)).capture(), _facts(2))
    path = _path(storage, info, "manifest.json")
    whole, (state, facts) = path.read_bytes(), snapshots.load(info)
    for at in range(0, len(whole), 5):
        _flip(path, at)
        loaded = snapshots.newest_good()
        assert loaded is None or (loaded.state.facts, loaded.facts) == (state.facts, facts)
        path.write_bytes(whole)
    assert snapshots.newest_good() is not None


def test_without_a_manifest_it_is_not_there(storage: LocalStorage, trained: Make) -> None:
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    first, second = (snapshots.write(state, _facts(seq)) for seq in (1, 2))
    _path(storage, second, "manifest.json").unlink()
    storage.write(f"runs/{RUN}/snapshots/notes/manifest.json", b"{}")
    storage.write(f"runs/{RUN}/snapshots/README", b"")
    assert snapshots.infos() == [first]
    loaded = snapshots.newest_good()
    assert loaded is not None and loaded.info == first and loaded.damaged == ()


def test_another_snapshot_under_its_key_is_refused(storage: LocalStorage, trained: Make) -> None:
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    first, second = (snapshots.write(state, _facts(seq)) for seq in (1, 2))
    for name in FILES:
        _path(storage, second, name).write_bytes(_path(storage, first, name).read_bytes())
    with pytest.raises(SignalError, match="another snapshot's"):
        snapshots.load(second)
    os.rename(storage.root / "runs" / RUN, storage.root / "runs" / "run_2")
    assert Snapshots(storage, "run_2").newest_good() is None


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (full_disk, SignalError, "storage_full"),
        (Broken, Broken, "^$"),
        (lambda: StorageAway("no answer"), StorageAway, "no answer"),
    ],
)
def test_a_failure_at_any_call_of_storage_leaves_nothing(
    tmp_path: Path,
    trained: Make,
    error: Callable[[], BaseException],
    raised: type[Exception],
    match: str,
) -> None:
    state = trained().capture()
    probe = Faulty(tmp_path / "probe", 0, error)
    Snapshots(probe, RUN).write(state, _facts(2))
    assert {"scratch", "put_folder", "read", "open", "list"} <= set(probe.calls)
    for number in range(1, len(probe.calls) + 1):
        root = tmp_path / str(number)
        before = Snapshots(LocalStorage(root), RUN).write(state, _facts(1))
        faulty = Faulty(root, number, error)
        with pytest.raises(raised, match=match):
            Snapshots(faulty, RUN).write(state, _facts(2))
        plain = LocalStorage(root)
        assert Snapshots(plain, RUN).infos() == [before]
        assert len(_keys(plain)) == len(FILES) and not _left_aside(plain)


def _is_full(write: Callable[[], object]) -> bool:
    try:
        write()
    except SignalError as error:
        return error.code == "storage_full"
    return False


def test_a_disk_that_is_full_at_any_byte_leaves_nothing(tmp_path: Path, trained: Make) -> None:
    state = trained(r=16).capture()
    with small_disk(tmp_path / "disk", 4) as mounted:
        if not mounted:
            pytest.skip("mounting a file system is not allowed here")
        storage = LocalStorage(tmp_path / "disk" / "store")
        snapshots = Snapshots(storage, RUN)
        info = snapshots.write(state, _facts(1))
        full = 0
        for leave in range(0, info.size_bytes + 40_960, info.size_bytes // 16):
            with filled(tmp_path / "disk", leave):
                full += _is_full(lambda: snapshots.write(state, _facts(2)))
            for other in snapshots.infos()[:-1]:
                storage.delete(other.key)
            assert snapshots.infos() == [info] and not _left_aside(storage)
            assert snapshots.newest_good() is not None
        assert full > 8


def test_what_is_read_back_otherwise_than_written_is_refused(
    storage: LocalStorage, trained: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStorage.put_folder
    for name in FILES:

        def flipping(self: LocalStorage, key: str, folder: Path, name: str = name) -> None:
            put(self, key, folder)
            _flip(self.root / key / name, 30)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "put_folder", flipping)
            with pytest.raises(SignalError, match="snapshot_damaged") as caught:
                Snapshots(storage, RUN).write(trained().capture(), _facts(1))
        assert caught.value.data["file"] == name
        assert _keys(storage) == [] and not _left_aside(storage)


def test_another_folder_of_the_same_key_is_left_alone(
    storage: LocalStorage, trained: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    info = snapshots.write(state, _facts(1))
    with pytest.raises(FileExistsError):
        snapshots.write(state, _facts(1))
    assert snapshots.infos() == [info] and not _left_aside(storage)


@pytest.mark.parametrize("order", [FILES, FILES[::-1]])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_killed_between_the_steps_of_a_store_that_cannot_rename(
    tmp_path: Path, trained: Make, order: list[str], stop: int
) -> None:
    state, root = trained().capture(), tmp_path / "store"
    first = Snapshots(LocalStorage(root), RUN).write(state, _facts(1))
    dying: Storage = OneByOne(root, order, stop)
    if stop < 2:
        with pytest.raises(Broken):
            Snapshots(dying, RUN).write(state, _facts(2))
    else:
        Snapshots(dying, RUN).write(state, _facts(2))
    loaded = Snapshots(LocalStorage(root), RUN).newest_good()
    assert loaded is not None and loaded.info.seq == (2 if stop == 2 else 1)
    # A later snapshot makes the remains prunable.
    after = Snapshots(LocalStorage(root), RUN)
    third = after.write(state, _facts(3))
    after.prune({first.key, third.key})
    assert {key.rpartition("/")[0] for key in _keys(LocalStorage(root))} == {first.key, third.key}


KILLED = """
import sys, torch
from pathlib import Path
from workers.engine.state import TrainerState
from workers.session.snapshots import Snapshots
from workers.storage import LocalStorage

facts = {"layout": {}, "optimizer": {"name": "adamw", "steps": 1}, "accumulation": None}
state = TrainerState({"master": torch.arange(100.0)}, facts)
snapshots = Snapshots(LocalStorage(Path(sys.argv[1])), "run_1")
for seq in range(1, 20):
    snapshots.write(state, {"seq": seq, "epoch": 1})
"""


def test_sigkill_at_every_stage(tmp_path: Path) -> None:
    points = ("filling", "tensors", "renaming", "renamed")
    for number, point in enumerate(points):
        folder, root = tmp_path / point, tmp_path / f"{point}.store"
        folder.mkdir()
        (folder / f"snapshot.{point}").write_text(f"after:{number}\nkill")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(root)], timeout=120, check=False,
            env={**os.environ, "SIGNAL_FAILPOINTS": str(folder)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        storage = LocalStorage(root)
        loaded = Snapshots(storage, RUN).newest_good()
        whole = number + (point == "renamed")
        assert (loaded.info.seq if loaded else 0) == whole
        assert len(_keys(storage)) == 2 * whole
        # The next scratch folder of anybody removes what the dead one left.
        storage.scratch()
        assert len(_left_aside(storage)) == 1


def test_prune_deletes_all_others_but_what_is_newer(storage: LocalStorage, trained: Make) -> None:
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    infos = [snapshots.write(state, _facts(seq)) for seq in range(1, 6)]
    _path(storage, infos[0], "manifest.json").unlink()
    storage.write(f"runs/{RUN}/bodies/1", b"x")
    snapshots.prune({infos[1].key, infos[3].key})
    assert [info.seq for info in snapshots.infos()] == [5, 4, 2]
    assert not (storage.root / infos[0].key).exists()
    snapshots.prune(())
    assert _keys(storage) == [f"runs/{RUN}/bodies/1"]


def test_facts_must_be_json_and_name_the_place(storage: LocalStorage, trained: Make) -> None:
    snapshots, state = Snapshots(storage, RUN), trained().capture()
    with pytest.raises(KeyError, match="epoch"):
        snapshots.write(state, {"seq": 1})
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            snapshots.write(state, _facts(1, config=value))
    assert _keys(storage) == [] and not _left_aside(storage)
    info = snapshots.write(state, _facts(1, config={"targets": ("a", "b"), "x": None}))
    assert snapshots.load(info)[1]["config"] == {"targets": ["a", "b"], "x": None}


def test_the_manifest_can_be_read_by_anybody(storage: LocalStorage, trained: Make) -> None:
    info = Snapshots(storage, RUN).write(trained().capture(), _facts(4))
    manifest = json.loads(_path(storage, info, "manifest.json").read_text())
    assert manifest["format"] == "signal-snapshot/1" and manifest["run_id"] == RUN
    assert manifest["facts"] == _facts(4) and manifest["state"]["optimizer"]["steps"] == 1
    (file,) = manifest["files"]
    assert file["size_bytes"] == _path(storage, info, file["path"]).stat().st_size
