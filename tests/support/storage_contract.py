"""What every storage must do, whatever is behind it: a class of tests that its implementations inherit."""

from __future__ import annotations

import io
import json
import random
import threading
import time
from pathlib import Path

import pytest

from workers.storage import MANIFEST, Storage


def folder_of(storage: Storage, files: dict[str, bytes]) -> Path:
    """A scratch folder with these files and a manifest that names them."""
    folder = storage.scratch()
    names = json.dumps(sorted(files)).encode()
    for name, data in {MANIFEST: names, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def keys_of(storage: Storage, prefix: str) -> list[str]:
    """The keys below a prefix."""
    return [info.key for info in storage.list(prefix)]


class StorageContract:
    """Inherit it, and define the fixture `storage`."""

    def test_what_was_written_last_is_read(self, storage: Storage) -> None:
        for data in (b"one", b"", b"two \x00" * 100_000):
            storage.write("runs/a/bodies/1", data)
            assert storage.read("runs/a/bodies/1") == data

    def test_what_is_not_there(self, storage: Storage) -> None:
        storage.write("runs/a/bodies/1", b"one")
        for key in ("runs/a/bodies/2", "runs/a/bodies", "runs/a/bodies/1/x", "runs/b/bodies/1"):
            assert storage.read(key) is None
            assert storage.stat(key) is None
            with pytest.raises(FileNotFoundError):
                storage.open(key)
        assert storage.list("runs/b") == storage.list("runs/a/bodies/1") == []
        storage.delete("runs/b")
        storage.delete("runs/a/bodies/1/x")
        assert storage.read("runs/a/bodies/1") == b"one"

    @pytest.mark.parametrize(
        "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "a/\x00"]
    )
    def test_a_key_cannot_leave_the_root(self, storage: Storage, key: str) -> None:
        with pytest.raises(ValueError, match="not a storage key"):
            storage.write(key, b"")
        for look in (storage.read, storage.stat, storage.open, storage.list, storage.delete):
            with pytest.raises(ValueError, match="not a storage key"):
                look(key)

    def test_names_are_taken_as_they_are(self, storage: Storage) -> None:
        keys = sorted(
            f"runs/a/artifacts/{name}/f" for name in ("a b", "a+b", "ä%2F&<?", "'\"", "~")
        )
        for key in keys:
            storage.write(key, key.encode())
        assert keys_of(storage, "runs/a/artifacts") == keys
        assert [storage.read(key) for key in keys] == [key.encode() for key in keys]
        storage.delete("runs/a")
        assert storage.list("runs/a") == []

    def test_size_and_time(self, storage: Storage) -> None:
        storage.write("a/b", b"12345")
        found = storage.stat("a/b")
        assert found is not None
        assert (found.key, found.size) == ("a/b", 5)
        assert abs(found.modified_at - time.time()) < 60
        assert storage.list("a") == [found]

    def test_a_list_is_sorted_and_of_this_folder_only(self, storage: Storage) -> None:
        for key in ("a/2", "a/10", "a/1/x", "ab/1", "b"):
            storage.write(key, b"")
        assert keys_of(storage, "a") == ["a/1/x", "a/10", "a/2"]

    def test_delete_takes_a_file_or_a_folder_and_no_more(self, storage: Storage) -> None:
        for key in ("a/1", "a/2", "a/b/3", "a/bc/4", "ab/5"):
            storage.write(key, b"x")
        storage.delete("a/1")
        assert keys_of(storage, "a") == ["a/2", "a/b/3", "a/bc/4"]
        storage.delete("a/b")
        assert keys_of(storage, "a") == ["a/2", "a/bc/4"]
        storage.delete("a")
        assert storage.list("a") == [] and keys_of(storage, "ab") == ["ab/5"]

    def test_a_reader_seeks(self, storage: Storage) -> None:
        data = random.Random(0).randbytes(3_000_000)
        storage.write("big", data)
        with storage.open("big") as file:
            assert file.seekable() and file.readable()
            assert file.read(10) == data[:10]
            for place, size in ((2_999_990, 100), (0, 1), (1_048_570, 20), (1_500_000, 700_000)):
                assert file.seek(place) == file.tell() == place
                assert file.read(size) == data[place : place + size]
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:] and file.read() == b"" and file.read(1) == b""
            file.seek(len(data) + 5)
            assert file.read(1) == b""
            file.seek(0)
            assert file.read() == data
        storage.write("empty", b"")
        with storage.open("empty") as file:
            assert file.read() == b""

    def test_a_folder_appears_whole_and_once(self, storage: Storage) -> None:
        files = {"sub/f": b"x", "g": b""}
        folder = folder_of(storage, files)
        storage.put_folder("saved/one", folder)
        assert not folder.exists()
        assert keys_of(storage, "saved") == [
            f"saved/one/{name}" for name in ("g", "manifest.json", "sub/f")
        ]
        assert storage.read("saved/one/sub/f") == b"x"
        with pytest.raises(FileExistsError):
            storage.put_folder("saved/one", folder_of(storage, {"g": b"other"}))
        assert storage.read("saved/one/g") == b""
        storage.delete("saved/one")
        storage.put_folder("saved/one", folder_of(storage, {"g": b"other"}))
        assert keys_of(storage, "saved") == ["saved/one/g", "saved/one/manifest.json"]

    def test_a_folder_needs_a_manifest(self, storage: Storage) -> None:
        folder = storage.scratch()
        (folder / "f").write_bytes(b"x")
        with pytest.raises(ValueError, match=MANIFEST):
            storage.put_folder("saved", folder)
        assert storage.list("saved") == []

    def test_two_writers_of_one_folder_do_not_mix(self, storage: Storage) -> None:
        for attempt in range(5):
            _race(storage, f"race/{attempt}")

    def test_scratch_folders_are_empty_and_apart(self, storage: Storage) -> None:
        first, second = storage.scratch(), storage.scratch()
        assert first != second and list(first.iterdir()) == list(second.iterdir()) == []


def _race(storage: Storage, key: str) -> None:
    """Two threads put a folder under one key: one gives up, and what is there is the other's."""
    start, won = threading.Barrier(2), []

    def put(writer: str) -> None:
        files = {f"f{n}": f"{writer}{n}".encode() for n in range(4)}
        folder = folder_of(storage, {**files, writer: b""})
        start.wait()
        try:
            storage.put_folder(key, folder)
        except FileExistsError:
            return
        won.append(writer)

    threads = [threading.Thread(target=put, args=(writer,)) for writer in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Both may give up to each other, where storage cannot rename; then nobody is told of a folder.
    assert len(won) <= 1
    for writer in won:
        names = json.loads(storage.read(f"{key}/{MANIFEST}") or b"")
        assert names == [writer, *(f"f{n}" for n in range(4))]
        assert [storage.read(f"{key}/f{n}") for n in range(4)] == [
            f"{writer}{n}".encode() for n in range(4)
        ]
