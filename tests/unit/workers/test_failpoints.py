"""Fail-points in processes that are there to die of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PASSES = (
    "from workers.failpoints import hit\nfor i in range({n}): hit('here', 'a b')\nprint('through')"
)


def passing(folder: Path | None, n: int = 1) -> subprocess.CompletedProcess[str]:
    named = {} if folder is None else {"SIGNAL_FAILPOINTS": str(folder)}
    return subprocess.run(
        [sys.executable, "-P", "-c", PASSES.format(n=n)],
        env={"PATH": os.environ["PATH"], **named},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        start_new_session=True,
    )


def arm(folder: Path, text: str) -> None:
    (folder / "here").write_text(text)


def test_nothing_happens_without_a_folder_or_an_armed_point(tmp_path):
    assert passing(None).stdout == "through\n"
    assert passing(tmp_path, 3).stdout == "through\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("kill", -signal.SIGKILL),
        ("killgroup", -signal.SIGKILL),
        ("segv", -signal.SIGSEGV),
        ("abort", -signal.SIGABRT),
        ("exit:70", 70),
    ],
)
def test_it_ends_the_process_once(tmp_path, action, code):
    arm(tmp_path, action)
    found = passing(tmp_path)
    assert found.returncode == code
    (claim,) = tmp_path.glob("here.hit.*")
    assert time.time() - claim.stat().st_ctime < 30
    assert passing(tmp_path).stdout == "through\n"


def test_it_raises_what_it_is_told(tmp_path):
    arm(tmp_path, "raise:ENOSPC")
    assert "OSError: [Errno 28] No space left on device" in passing(tmp_path).stderr


def test_passes_are_counted_over_processes(tmp_path):
    arm(tmp_path, "after:3\nexit:9")
    assert [passing(tmp_path).returncode for _ in range(5)] == [0, 0, 0, 9, 0]


def test_only_a_pass_with_the_word_counts(tmp_path):
    arm(tmp_path, "after:1\nwhen:c\nexit:9")
    assert passing(tmp_path, 5).returncode == 0
    arm(tmp_path, "after:1\nwhen:b\nexit:9")
    assert passing(tmp_path, 2).returncode == 9


def test_a_process_waits_until_it_is_let_go(tmp_path):
    arm(tmp_path, "wait")
    command = [sys.executable, "-P", "-c", PASSES.format(n=1)]
    environment = {"PATH": os.environ["PATH"], "SIGNAL_FAILPOINTS": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not (claims := list(tmp_path.glob("here.hit.*"))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert claims[0].name == f"here.hit.{process.pid}"
        time.sleep(0.1)
        assert process.poll() is None
        (tmp_path / "here.go").touch()
        assert process.communicate(timeout=10)[0] == "through\n"
