"""Who is to blame for a worker's end: what the process did, or what was done to it."""

from __future__ import annotations

import signal

import pytest

from gpu_pool.exits import End, blames, in_words, logged_status
from gpu_pool.process import Process

CHILD = Process(123, 1)


@pytest.mark.parametrize("number", ["SEGV", "ABRT", "BUS", "FPE", "ILL"])
def test_what_code_does_to_itself_is_its_own_fault(number: str) -> None:
    end = End(CHILD, -signal.Signals[f"SIG{number}"])
    assert blames(end)
    assert in_words(end) == f"was killed by SIG{number}"


@pytest.mark.parametrize("status", [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, 0, 1, 70])
def test_what_comes_from_outside_is_not(status: int) -> None:
    assert not blames(End(CHILD, status))


def test_a_broken_device_and_memory_that_ran_out_are() -> None:
    assert blames(End(CHILD, 71))
    assert in_words(End(CHILD, 71)) == "exited with status 71"
    out_of_memory = End(CHILD, -signal.SIGKILL, out_of_memory=True)
    assert blames(out_of_memory)
    assert "memory" in in_words(out_of_memory)


def test_what_nobody_can_tell_blames_nobody() -> None:
    assert not blames(End(CHILD, None))
    assert in_words(End(CHILD, None)) == "ended"
    assert in_words(End(CHILD, -64)) == "was killed by SIGRTMAX"
    assert in_words(End(CHILD, -63)) == "was killed by signal 63"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("exited with 'signal 11 (SIGSEGV)'", -11),
        ("exited with 'signal 63'", -63),
        ("exited with 'exitcode 71'", 71),
        ("exited with 'something else'", None),
        ("goes on", None),
    ],
)
def test_the_parents_words_in_the_log(words: str, status: int | None) -> None:
    log = (
        "[ERROR] Process 'ForkPoolWorker-1' pid:1234 exited with 'signal 9 (SIGKILL)'\n"
        f"[ERROR] Process 'ForkPoolWorker-2' pid:123 {words}\n"
        "[ERROR] Process 'ForkPoolWorker-3' pid:12 exited with 'exitcode 1'\n"
    )
    assert logged_status(log, 123) == status
