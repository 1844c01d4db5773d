"""When a worker counts as silent, and when a run is rung for again."""

from __future__ import annotations

from gpu_pool.timing import Bell, Pulse


def test_silence_is_time_without_a_new_heartbeat() -> None:
    pulse = Pulse()
    assert pulse.silent_s("1", 100.0) == 0
    assert pulse.silent_s("1", 103.0) == 3
    assert pulse.silent_s("2", 104.0) == 0
    assert pulse.silent_s("2", 106.0) == 2


def test_silence_while_nobody_could_hear_does_not_count() -> None:
    pulse = Pulse()
    pulse.silent_s("1", 100.0)
    pulse.silent_s("1", 104.0)
    assert pulse.silent_s("1", 700.0) == 0
    assert pulse.silent_s("1", 702.0) == 2


def rings(bell: Bell, until: int, *, applied: int, waiting: bool, running: bool) -> list[int]:
    """The seconds, counted from 0 in steps of one, at which the bell rings."""
    return [second for second in range(until) if bell.due(applied, waiting, running, second)]


def test_it_rings_when_work_stands_still_and_less_and_less() -> None:
    found = rings(Bell(), 100, applied=4, waiting=True, running=False)
    assert found == [1, 3, 7, 15, 31, 61, 91]


def test_a_running_operation_has_more_patience() -> None:
    assert rings(Bell(), 100, applied=4, waiting=True, running=True) == [15, 45, 75]


def test_no_work_no_ring() -> None:
    assert rings(Bell(), 100, applied=4, waiting=False, running=False) == []


def test_progress_puts_it_off() -> None:
    bell = Bell()
    assert not any(bell.due(step, True, False, step) for step in range(50))
    assert bell.due(49, True, False, 51)
