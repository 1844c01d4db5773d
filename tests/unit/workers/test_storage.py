"""Local storage: whole or not there, and never outside its root."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.errors import SignalError
from tests.support.storage_contract import StorageContract, folder_of, keys_of
from tests.support.valkey import settings_for
from workers.storage import LocalStorage, open_storage

Broken = Callable[[object, str, Callable[[], None]], None]

WRITES_AND_WAITS = """
import sys, time
from pathlib import Path
from workers.storage import LocalStorage
print((LocalStorage(Path(sys.argv[1])).scratch() / "half").write_bytes(b"x"), flush=True)
time.sleep(60)
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


class TestLocalStorage(StorageContract):
    pass


def left_aside(storage: LocalStorage) -> list[Path]:
    """What is in the place for unfinished files, but for its locks."""
    found = (storage.root / ".aside").glob("*/*")
    return [path for path in found if path.name != "alive"]


def test_nothing_is_readable_by_others(storage: LocalStorage) -> None:
    storage.write("runs/a/1", b"x")
    storage.put_folder("runs/a/saved", folder_of(storage, {}))
    for path in (
        storage.root,
        storage.root / "runs/a",
        storage.root / "runs/a/1",
        storage.root / "runs/a/saved",
    ):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT, errno.EIO])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Makes a function fail; calls must say why."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    full = request.param != errno.EIO
    expected, words = (SignalError, "storage_full") if full else (OSError, "Input/output error")

    def by(owner: object, name: str, call: Callable[[], None]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(expected, match=words):
                call()

    return by


@pytest.mark.parametrize(
    ("owner", "name"), [(tempfile, "mkstemp"), (Path, "mkdir"), (os, "fsync"), (os, "replace")]
)
def test_a_write_that_fails_leaves_no_file(
    storage: LocalStorage, broken: Broken, owner: object, name: str
) -> None:
    storage.write("key", b"old")
    broken(owner, name, lambda: storage.write("new/key", b"new"))
    if owner is not Path:
        broken(owner, name, lambda: storage.write("key", b"new"))
    assert storage.read("key") == b"old"
    assert storage.list("new") == [] and left_aside(storage) == []


@pytest.mark.parametrize(("owner", "name"), [(Path, "mkdir"), (os, "fsync"), (os, "rename")])
def test_a_folder_that_cannot_be_moved_is_not_there(
    storage: LocalStorage, broken: Broken, owner: object, name: str
) -> None:
    folder = folder_of(storage, {"f": b"x"})
    broken(owner, name, lambda: storage.put_folder("a/b", folder))
    assert storage.list("a") == []
    storage.put_folder("a/b", folder)
    assert keys_of(storage, "a") == ["a/b/f", "a/b/manifest.json"]


def test_a_write_and_the_folders_made_for_it_are_synced(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("first", b"")
    synced: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
    )
    storage.write("a/b/c", b"x")
    assert synced[1:] == [storage.root, storage.root / "a", storage.root / "a" / "b"]
    folder = folder_of(storage, {"sub/f": b"x"})
    synced.clear()
    storage.put_folder("saved", folder)
    parts = {folder, folder / "sub", folder / "sub" / "f", folder / "manifest.json"}
    assert set(synced) == {*parts, storage.root} and synced[-1] == storage.root


def test_a_full_disk_can_be_emptied(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("a/b/manifest.json", "a/b/f", "a/g"):
        storage.write(key, b"x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    storage.delete("a/b")
    assert keys_of(storage, "a") == ["a/g"]


def test_a_folder_is_deleted_at_once(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_folder("a/b", folder_of(storage, {"f": b"x"}))
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # killed right after the rename
    storage.delete("a/b")
    assert storage.list("a") == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    storage: LocalStorage,
) -> None:
    command = [sys.executable, "-c", WRITES_AND_WAITS, str(storage.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            mine = storage.scratch()
            halves = list((storage.root / ".aside").glob("*/*/half"))
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(halves) == 1
    second = LocalStorage(storage.root).scratch()
    assert not halves[0].exists() and not halves[0].parent.parent.exists()
    assert mine.is_dir() and second.is_dir()


def test_a_folder_that_is_not_locked_yet_is_never_seen(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = tempfile.mkdtemp

    def mkdtemp(dir: Path) -> str:
        made = real(dir=dir)
        if dir == storage.root / ".aside":
            # What another process would do now is to wait for the gate.
            with (
                (storage.root / ".aside" / "gate").open("rb") as gate,
                pytest.raises(BlockingIOError),
            ):
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(True)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    storage.scratch()
    assert seen == [True]


def test_the_settings_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_storage(settings_for(tmp_path, "redis://unused"))
    assert isinstance(local, LocalStorage) and local.root == tmp_path / "store"
    for bad in (
        "s3:",
        "s3://",
        "s3:///a",
        "s3://b/../c",
        "s3://b/a//c",
        "gs://b",
        "/srv",
        "bucket",
    ):
        with pytest.raises(ValueError, match="SIGNAL_STORAGE"):
            open_storage(settings_for(tmp_path, "redis://unused", storage=bad))
    monkeypatch.setattr("workers.storage.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"SIGNAL_STORAGE.*boto3"):
        open_storage(settings_for(tmp_path, "redis://unused", storage="s3://bucket"))


def test_a_folder_costs_no_s3_library() -> None:
    code = "import sys, workers.storage; raise SystemExit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
