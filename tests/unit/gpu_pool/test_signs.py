"""What a served run shows: stuck operations, idleness, a journal that is gone, work that is overlooked."""

from __future__ import annotations

from dataclasses import replace

from gpu_pool.control import Report
from gpu_pool.signs import Signs
from workers.queue.records import Head

REPORT = Report(1, "run_1", "tiny", "1.0", progress="5")
HEAD = Head.from_redis(
    "run_1",
    {
        name.encode(): value.encode()
        for name, value in {
            "owner": "user_1", "epoch": "1", "entries": "4", "base": "0", "applied": "3",
            "closed": "", "close_err": "", "worker": "w", "worker_state": "ready", "device": "",
            "state": "{}", "activity": "1.0", "hold": "", "hold_info": "", "move": "",
        }.items()
    },
    3,
)  # fmt: skip
RUNNING = replace(HEAD, running=4, seq_count=4)


def stuck(signs: Signs, head: Head, seconds: int, begin: int = 0) -> float:
    """The last of so many looks, one a second."""
    return [signs.stuck_s(head, float(begin + second)) for second in range(seconds + 1)][-1]


def test_an_operation_without_progress_is_stuck() -> None:
    signs = Signs()
    signs.hear(REPORT)
    assert stuck(signs, RUNNING, 30) == 30
    signs.hear(replace(REPORT, progress="6"))
    assert stuck(signs, RUNNING, 2, begin=31) == 2
    # Another operation is another matter, even with the same count.
    assert signs.stuck_s(replace(RUNNING, running=5), 34.0) == 0


def test_a_worker_that_says_nothing_more_stays_stuck() -> None:
    signs = Signs()
    signs.hear(REPORT)
    stuck(signs, RUNNING, 60)
    signs.hear(None)
    assert stuck(signs, RUNNING, 5, begin=61) == 66


def test_nothing_runs_or_nothing_is_told_is_not_stuck() -> None:
    signs = Signs()
    signs.hear(REPORT)
    assert stuck(signs, HEAD, 100) == 0
    untold = Signs()
    untold.hear(replace(REPORT, progress=""))
    assert stuck(untold, RUNNING, 100) == 0


def test_time_in_which_the_server_was_away_does_not_count() -> None:
    signs = Signs()
    signs.hear(REPORT)
    stuck(signs, RUNNING, 10)
    assert stuck(signs, RUNNING, 3, begin=600) == 3


def test_loading_is_measured_by_progress_too() -> None:
    signs = Signs()
    assert [signs.loading_s(float(second)) for second in range(5)][-1] == 4
    signs.hear(REPORT)
    assert signs.loading_s(5.0) == 0


def test_idleness_is_counted_by_our_own_clock() -> None:
    signs = Signs()
    for second in range(20):
        signs.watch_idleness(HEAD, float(second))
    assert signs.idle_s == 19
    # An hour that was set on the server's clock is an activity, never an hour of idleness.
    signs.watch_idleness(replace(HEAD, last_activity=3601.0), 20.0)
    assert signs.idle_s == 0


def test_work_and_holds_are_not_idleness() -> None:
    for busy in (RUNNING, replace(HEAD, seq_count=4), replace(HEAD, hold="mismatch")):
        signs = Signs()
        for second in range(20):
            signs.watch_idleness(busy, float(second))
        assert signs.idle_s == 0


def test_how_long_a_journal_is_gone() -> None:
    signs = Signs()
    assert signs.absent_s(HEAD, 0.0) == 0
    assert [signs.absent_s(None, float(second)) for second in range(1, 5)][-1] == 3
    assert signs.absent_s(HEAD, 5.0) == 0
    assert signs.absent_s(None, 6.0) == 0


def test_nobody_rings_for_a_run_that_is_held() -> None:
    waiting = replace(HEAD, seq_count=4)
    signs = Signs()
    assert [s for s in range(5) if signs.bell_is_due(waiting, float(s))] == [1, 3]
    held = Signs()
    assert not any(
        held.bell_is_due(replace(waiting, hold="rolled_back"), float(s)) for s in range(60)
    )
