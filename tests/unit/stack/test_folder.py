"""The data folder: closed to others, secrets made once."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from web.stack import folder as folders
from web.stack.errors import StackError
from web.stack.folder import Folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_prepare_closes_folder_and_secrets(tmp_path):
    folder = Folder(tmp_path / "with space" / "data")
    folder.prepare()
    assert mode(folder.root) == mode(folder.redis) == mode(folder.logs) == 0o700
    assert mode(folder.secret) == mode(folder.flower_login) == 0o600
    assert len(folder.secret.read_text().strip()) >= 32


def test_prepare_closes_a_folder_that_was_open(tmp_path):
    tmp_path.chmod(0o755)
    Folder(tmp_path).prepare()
    assert mode(tmp_path) == 0o700


def test_secrets_are_made_once(tmp_path):
    folder = Folder(tmp_path)
    folder.prepare()
    before = folder.secret.read_text(), folder.flower_login.read_text()
    folder.prepare()
    assert (folder.secret.read_text(), folder.flower_login.read_text()) == before


def test_the_working_folder_must_stay_empty(tmp_path):
    folder = Folder(tmp_path)
    folder.prepare()
    (folder.working / "celery.py").touch()
    with pytest.raises(StackError, match=r"must be empty; remove celery\.py"):
        folder.prepare()


def test_a_file_in_the_way_is_an_error_that_names_it(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(StackError, match="data folder"):
        Folder(tmp_path / "data").prepare()


def test_where_the_default_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNAL_DATA_DIR", str(tmp_path))
    assert folders.default_folder() == tmp_path
    monkeypatch.delenv("SIGNAL_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert folders.default_folder() == Path("/xdg/signal")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert folders.default_folder() == Path("/home/someone/.local/share/signal")


def test_private_files_appear_whole_and_private(tmp_path):
    path = tmp_path / "file"
    folders.write_private(path, "one\n")
    folders.write_private(path, "two\n")
    assert path.read_text() == "two\n"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]
