"""The note of what is executed: nested, and there when the process is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from workers.executing import Executing, last_executed, path_of


def test_what_stood_still_goes_on(tmp_path: Path) -> None:
    path = path_of(tmp_path, "cpu0-ab12@a.host")
    executing = Executing(path)
    assert last_executed(path) == executing.now == ""
    with executing.of("run_1"):
        with executing.of("run_2"):
            assert last_executed(path) == executing.now == "run_2"
        assert last_executed(path) == "run_1"
        with pytest.raises(KeyError), executing.of("run_3"):
            raise KeyError
        assert last_executed(path) == "run_1"
    assert last_executed(path) == ""


def test_it_outlives_the_process(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with Executing(tmp_path / "now").of("run_1"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert last_executed(tmp_path / "now") == "run_1"


def test_where_it_cannot_be_noted_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "now"
    executing = Executing(path)
    with executing.of("run_1"):
        assert executing.now == "run_1"
        assert last_executed(path) == ""
