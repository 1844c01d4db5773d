"""Local storage: whole or not there, and never outside its root."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from schemas.errors import SignalError
from workers.storage import LocalStorage


def test_bytes_round_trip(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("runs/a/bodies/1", b"one")
    storage.write("runs/a/bodies/1", b"two")
    assert storage.read("runs/a/bodies/1") == b"two"
    assert storage.read("runs/a/bodies/2") is None
    with storage.open("runs/a/bodies/1") as file:
        file.seek(1)
        assert file.read() == b"wo"
    assert [info.key for info in storage.list("runs/a")] == ["runs/a/bodies/1"]
    storage.delete("runs/a")
    assert storage.list("runs/a") == [] and storage.stat("runs/a/bodies/1") is None


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/\x00"])
def test_a_key_cannot_leave_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a storage key"):
        LocalStorage(tmp_path).write(key, b"")


def test_a_folder_appears_whole_and_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for _ in range(2):
        folder = storage.scratch()
        (folder / "sub").mkdir()
        (folder / "sub" / "f").write_bytes(b"x")
        if storage.stat("saved/sub/f") is None:
            storage.put_folder("saved", folder)
            assert not folder.exists()
        else:
            with pytest.raises(FileExistsError):
                storage.put_folder("saved", folder)
    assert storage.read("saved/sub/f") == b"x"


def test_a_full_disk_is_named_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("key", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SignalError, match="storage_full"):
        storage.write("key", b"new")
    assert storage.read("key") == b"old"
    assert list((tmp_path / ".aside").iterdir()) == []
