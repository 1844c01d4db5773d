"""Several runs on one worker, by a real agent with real Celery workers: who joins, who leaves, who dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_pool import leases, of_run
from tests.chaos.points import Points
from tests.support.host import (
    Host,
    alive,
    forward_backward,
    pids_of,
    rows,
    running_host,
    sample,
    until,
)

Numbers = list[dict[str, Any]]


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Host]:
    """One slot, and no agent yet."""
    with running_host(tmp_path / "data folder", slots=1) as host:
        yield host


def pair(host: Host) -> tuple[str, str]:
    """Two runs of one base on one worker."""
    first, second = host.create_run(shared=True), host.create_run(shared=True, lora_r=6, seed=5)
    assert host.await_ready(first).worker == host.await_ready(second).worker
    return first, second


def certificate(host: Host, run_id: str) -> dict[str, Any]:
    """The hashes of weights, moments and gradients after everything before."""
    found = host.result(run_id, host.submit(run_id, "certificate"))
    return {name: value for name, value in found.items() if name != "timings"}


def rest(host: Host, run_id: str, first: int) -> Numbers:
    """What steps `first` to 6 come to, with the certificate of the end."""
    return [*host.train(run_id, first, 6), certificate(host, run_id)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Numbers, Numbers]:
    """What the runs of a pair come to in six steps on workers of their own."""
    with running_host(tmp_path_factory.mktemp("alone") / "data folder", slots=1) as host:
        host.start_agent()
        found = []
        for config in ({}, {"lora_r": 6, "seed": 5}):
            run_id = host.create_run(**config)
            found.append([*host.train(run_id, 1, 6), certificate(host, run_id)])
            host.journal.close(run_id, "cancelled")
        return found[0], found[1]


def test_a_run_joins_a_worker_and_leaves_it_and_the_others_stay(
    one: Host, alone: tuple[Numbers, Numbers]
) -> None:
    one.start_agent()
    first, second = pair(one)
    third = one.create_run(shared=True, lora_r=2)
    before = one.await_ready(first)
    pids = pids_of(one, before)
    one.await_ready(third)
    assert set(one.reports()[before.worker]["runs"].split(",")) == {first, second, third}
    with one.database.reading() as session:
        assert of_run.neighbours(session, [first]) == {first: 2}
    numbers = one.train(first, 1, 3), one.train(second, 1, 3)
    one.journal.hold(second, "paused", {"reason": "user"})
    until(lambda: one.request(second).state == "paused")
    one.journal.close(third, "cancelled")
    until(lambda: one.reasons(third) == ["ended"])
    until(lambda: one.reports()[before.worker]["runs"] == first)
    more = rest(one, first, 4)
    one.journal.release(second, "paused")
    one.await_ready(second, after=1)
    assert numbers[0] + more == alone[0]
    assert numbers[1] + rest(one, second, 4) == alone[1]
    (rebuilt,) = one.happened(second, "rebuilt")
    assert rebuilt["compared"] == 0, "it left with a snapshot"
    assert alive(pids) == list(pids)
    assert (one.head(first).epoch, one.happened(first, "worker_lost")) == (1, [])


def test_a_killed_worker_loses_all_its_runs_and_every_one_is_rebuilt(
    one: Host, alone: tuple[Numbers, Numbers]
) -> None:
    one.start_agent()
    runs = pair(one)
    numbers = [one.train(run_id, 1, 4) for run_id in runs]
    os.kill(pids_of(one, one.head(runs[0]))[1], signal.SIGKILL)
    for number, run_id in enumerate(runs):
        assert one.await_ready(run_id, after=1).epoch == 2
        (lost,) = one.happened(run_id, "worker_lost")
        assert not lost["blamed"]
        numbers[number] += rest(one, run_id, 5)
    assert tuple(numbers) == alone
    assert one.head(runs[0]).worker == one.head(runs[1]).worker


def test_only_the_run_that_executed_is_blamed_for_a_crash(
    one: Host, alone: tuple[Numbers, Numbers], tmp_path: Path
) -> None:
    points = Points(tmp_path / "points")
    one.environment["SIGNAL_FAILPOINTS"] = str(points.folder)
    one.start_agent()
    good, bad = pair(one)
    numbers = one.train(good, 1, 2)
    # A kind of operation that the other run has none of, so that nothing of it is struck when it is rebuilt.
    points.arm("computed", "segv", when="forward")
    crashing = one.submit(bad, "forward", top_k=0, rows=rows(16, 12))
    for crash in range(3):
        assert one.await_events(bad, "worker_lost", crash + 1)[-1]["blamed"]
        if crash < 2:
            # At once, before it is executed again.
            points.arm("computed", "segv", when="forward")
        one.await_ready(good, after=crash + 1)
    assert one.finished(bad, crashing).error["code"] == "operation_crashed_worker"
    one.await_ready(bad, after=3)
    assert not any(lost["blamed"] for lost in one.happened(good, "worker_lost"))
    assert numbers + rest(one, good, 3) == alone[0]
    assert one.result(bad, forward_backward(one, bad))["step"] == 0


def test_the_next_agent_adopts_a_worker_with_all_its_runs(
    one: Host, alone: tuple[Numbers, Numbers]
) -> None:
    one.start_agent()
    runs = pair(one)
    pids = pids_of(one, one.head(runs[0]))
    numbers = [one.train(run_id, 1, 2) for run_id in runs]
    one.stop_agent(signal.SIGKILL)
    # One of them ends while nobody looks.
    third = one.create_run(shared=True)
    one.start_agent()
    one.await_ready(third)
    numbers = [done + rest(one, run_id, 3) for done, run_id in zip(numbers, runs, strict=True)]
    assert tuple(numbers) == alone
    assert alive(pids) == list(pids)
    assert {one.head(run_id).epoch for run_id in (*runs, third)} == {1}
    assert len({one.head(run_id).worker for run_id in (*runs, third)}) == 1


def test_a_lease_that_ended_between_two_agents_is_given_up_and_the_others_stay(one: Host) -> None:
    one.start_agent()
    first, second = pair(one)
    node = one.head(first).worker
    one.stop_agent(signal.SIGKILL)
    with one.database.writing() as session:
        (lease,) = [it for it in leases.open_leases(session, "here") if it.run_id == second]
        leases.requeue(session, lease, "host_lost", "paused")
    one.journal.hold(second, "paused", {"reason": "user"})
    one.start_agent()
    until(lambda: one.reports()[node]["runs"] == first, 15)
    assert one.result(first, forward_backward(one, first))["step"] == 0
    assert one.head(first).epoch == 1


def test_an_agent_that_stops_drains_every_run_of_a_worker(
    one: Host, alone: tuple[Numbers, Numbers]
) -> None:
    one.start_agent()
    runs = pair(one)
    numbers = [one.train(run_id, 1, 3) for run_id in runs]
    assert one.stop_agent() == 0
    assert {one.request(run_id).state for run_id in runs} == {"queued"}
    assert [one.reasons(run_id) for run_id in runs] == [["drained"]] * 2
    one.start_agent()
    for number, run_id in enumerate(runs):
        one.await_ready(run_id, after=1)
        assert one.happened(run_id, "rebuilt")[0]["compared"] == 0
        numbers[number] += rest(one, run_id, 4)
    assert tuple(numbers) == alone


def test_a_run_that_is_to_be_alone_waits_and_is_joined_by_nobody(one: Host) -> None:
    one.start_agent()
    first = one.create_run(shared=True)
    one.await_ready(first)
    single, second = one.create_run(), one.create_run(shared=True)
    one.await_ready(second)
    assert one.request(single).state == "queued"
    for run_id in (first, second):
        one.journal.close(run_id, "cancelled")
    one.await_ready(single)
    late = one.create_run(shared=True)
    time.sleep(2.0)
    assert one.request(late).state == "queued"
    assert one.slots() == [("leased", single)]


def test_no_more_than_so_many(one: Host) -> None:
    one.environment["SIGNAL_MAX_RUNS_PER_WORKER"] = "2"
    one.start_agent()
    runs = [one.create_run(shared=True) for _ in range(3)]
    for run_id in runs[:2]:
        one.await_ready(run_id)
    time.sleep(1.5)
    assert one.request(runs[2]).state == "queued"
    one.journal.close(runs[0], "cancelled")
    one.await_ready(runs[2])


def test_an_idle_run_makes_room_and_its_neighbour_stays(one: Host) -> None:
    one.environment |= {"SIGNAL_MAX_RUNS_PER_WORKER": "2", "SIGNAL_IDLE_PAUSE": "1.5"}
    one.start_agent()
    busy, idle = pair(one)
    third = one.create_run(shared=True)
    while not one.happened(idle, "paused"):
        one.result(busy, forward_backward(one, busy))
    one.await_ready(third)
    assert one.happened(idle, "paused") == [{"reason": "idle"}]
    assert one.head(busy).epoch == 1


def test_a_run_moves_from_one_shared_worker_to_another(
    tmp_path: Path, alone: tuple[Numbers, Numbers]
) -> None:
    with running_host(tmp_path / "data folder", slots=2) as host:
        host.start_agent()
        runs = [host.create_run(shared=True) for _ in range(2)]
        for run_id in runs:
            host.await_ready(run_id)
        third = host.create_run(shared=True, lora_r=6, seed=5)
        before = host.await_ready(third).device
        assert before is not None
        numbers = host.train(third, 1, 3)
        host.journal.move(third, f"here/{before['slot']}")
        after = host.await_ready(third, after=1).device
        assert after is not None and after["slot"] != before["slot"]
        assert numbers + rest(host, third, 4) == alone[1]
        assert host.reasons(third) == ["moved", None]
        assert [host.head(run_id).epoch for run_id in runs] == [1, 1]


def test_one_message_for_many_operations_of_several_runs(
    one: Host, alone: tuple[Numbers, Numbers]
) -> None:
    one.settings = replace(one.settings, doorbell="coalesced")
    one.environment["SIGNAL_DOORBELL"] = "coalesced"
    one.start_agent()
    runs = pair(one)
    # Waiting for each, then both in one go: no bell may stay taken.
    numbers = [one.train(run_id, 1, 1) for run_id in runs]
    for step in (2, 3):
        numbers = [
            done + one.train(run, step, step) for done, run in zip(numbers, runs, strict=True)
        ]
    numbers = [done + rest(one, run, 4) for done, run in zip(numbers, runs, strict=True)]
    assert tuple(numbers) == alone
    assert [one.happened(run_id, "worker_lost") for run_id in runs] == [[], []]


def test_a_long_queue_of_one_keeps_nobody_from_coming(one: Host) -> None:
    """Also where one message stands for all of it."""
    one.start_agent()
    first = one.create_run(shared=True)
    one.await_ready(first)
    queue = [forward_backward(one, first, silently=True, length=50) for _ in range(1500)]
    until(lambda: one.head(first).applied > 0)
    second = one.create_run(shared=True)
    one.await_ready(second)
    one.result(second, forward_backward(one, second))
    assert one.head(first).applied < len(queue)
    one.result(first, queue[-1])


def test_a_long_sample_of_one_holds_nobody_up(one: Host) -> None:
    one.start_agent()
    first, second = pair(one)
    one.result(second, forward_backward(one, second))
    long = sample(one, first, 1900)
    until(lambda: one.head(first).running is not None)
    quick = [forward_backward(one, second, silently=True) for _ in range(3)]
    for number in quick:
        one.result(second, number)
    assert one.head(first).running is not None, "the sample still runs"
    assert one.finished(first, long).status == "completed"
