"""stack.json and logs: what is written is what is read back."""

from __future__ import annotations

import os

from gpu_pool.process import Process, boot_id
from web.stack import children, state
from web.stack.folder import Folder


def recorded(folder: Folder) -> state.State:
    me = Process.of(os.getpid())
    assert me is not None
    found = state.State(
        me, boot_id(), "http://127.0.0.1:1", "http://127.0.0.1:2", True, 1.5, {"REDIS_URL": "r"}
    )
    found.processes["web"] = Process(2**22 - 1, 7)
    found.restarts["web"] = 3
    state.write(folder, found)
    return found


def test_state_is_read_back(tmp_path):
    folder = Folder(tmp_path)
    assert state.read(folder) is None
    written = recorded(folder)
    assert state.read(folder) == written


def test_a_torn_state_counts_as_none(tmp_path):
    folder = Folder(tmp_path)
    folder.state.write_text('{"supervisor": {"pid": 1')
    assert state.read(folder) is None
    folder.state.write_text('{"supervisor": {"pid": 1, "started": 1}, "processes": {}, "new": 1}')
    assert state.read(folder) is None


def test_pids_of_an_earlier_boot_mean_nothing(tmp_path):
    found = recorded(Folder(tmp_path))
    assert found.supervised()
    assert len(found.everyone()) == 2
    found.boot = "another"
    assert not found.supervised()
    assert found.everyone() == []


def test_one_supervisor_per_data_folder(tmp_path):
    folder = Folder(tmp_path)
    assert not state.locked(folder)
    held = state.lock(folder)
    assert held is not None
    assert state.lock(folder) is None
    assert state.locked(folder)
    os.close(held)
    assert not state.locked(folder)


def test_tail_gives_the_words_of_this_start_only(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("old\n")
    since = log.stat().st_size
    log.write_text("old\nnew 1\nnew 2\nnew 3\n")
    assert children.tail(log, lines=2, since=since) == "new 2\nnew 3"
    assert children.tail(log, since=since) == "new 1\nnew 2\nnew 3"
    assert children.tail(tmp_path / "none.log") == ""


def test_a_rotated_log_is_read_from_its_start(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("after the rotation\n")
    assert children.tail(log, since=10_000) == "after the rotation"


def test_rotate_keeps_one_predecessor(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "LOG_LIMIT_BYTES", 10)
    log = tmp_path / "x.log"
    log.write_text("short\n")
    children.rotate(log)
    assert log.read_text() == "short\n"
    log.write_text("long enough\n")
    children.rotate(log)
    assert log.read_text() == ""
    assert (tmp_path / "x.log.1").read_text() == "long enough\n"
