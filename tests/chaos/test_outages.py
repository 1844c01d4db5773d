"""Redis cut, silent, restarted and emptied, the clock wrong, `signal up` gone, memory used up: under load."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from tests.chaos.conftest import Reference
from tests.chaos.course import again, course, difference, essence, forward
from tests.chaos.harness import Chaos, chaos_stack, kill, restarted
from tests.chaos.preload import Clock
from tests.support.api import Run, error_of
from tests.support.inside import until
from tests.support.plan import futures
from workers.settings import MIB


def equal(chaos: Chaos, run: Run, results: list[dict[str, Any]], reference: Reference) -> None:
    """Every answer, and the state behind them."""
    assert difference(results, reference.results) is None
    assert chaos.certificate(run)["sha256"] == reference.certificate["sha256"]


@contextmanager
def meanwhile(disturb: Any, every_s: float) -> Iterator[None]:
    """Calls `disturb` again and again while the block runs."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every_s):
            try:
                disturb()
            except RedisError:
                continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


@pytest.mark.parametrize("every_s", [0.2, pytest.param(0.03, marks=pytest.mark.long)])
def test_connections_are_cut_all_the_time(
    chaos: Chaos, reference: Reference, every_s: float
) -> None:
    def cut() -> None:
        chaos.inside.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        chaos.inside.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")

    with chaos.run() as run:
        with meanwhile(cut, every_s):
            results = chaos.train(run)
        equal(chaos, run, results, reference)


@pytest.mark.parametrize("seconds", [7, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.timeout(240)
def test_redis_is_silent(
    chaos: Chaos, reference: Reference, chance: random.Random, seconds: int
) -> None:
    """SIGSTOP: connections stay open and nothing answers."""
    at = chance.randrange(20, 100)

    def before(index: int) -> None:
        if index == at:
            redis = chaos.inside.service("redis")
            redis.signal(signal.SIGSTOP)
            timer = threading.Timer(seconds, redis.signal, [signal.SIGCONT])
            timer.start()

    with chaos.run() as run:
        began = time.monotonic()
        # The SDK by itself gives up after a minute.
        results = chaos.train(run, before, retry_for=180.0)
        assert time.monotonic() - began > seconds
        equal(chaos, run, results, reference)


@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.long)])
def test_redis_is_restarted(
    chaos: Chaos, reference: Reference, chance: random.Random, times: int
) -> None:
    when = sorted(chance.sample(range(10, 120), times))

    def before(index: int) -> None:
        if index in when:
            redis = chaos.inside.service("redis")
            kill(redis)
            chaos.inside.await_restart(redis, "redis", 60)

    with chaos.run() as run:
        equal(chaos, run, chaos.train(run, before), reference)


def test_redis_is_emptied_and_the_worker_puts_back_what_it_knows(
    chaos: Chaos, reference: Reference, chance: random.Random
) -> None:
    """FLUSHALL under load: nothing hangs, nothing is rolled back silently, and what follows is equal."""
    operations = course()
    with chaos.run() as run:
        lost = flushed(chaos, run, operations, chance.randrange(30, 90))
        follow_on(chaos, run, operations, reference, lost)


@pytest.mark.long
def test_redis_is_emptied_and_the_worker_dies_with_it(
    chaos: Chaos, reference: Reference, chance: random.Random
) -> None:
    """Nobody is left who knows the newest operations: the run is at its snapshot, and says so."""
    operations = course()
    with chaos.run() as run:
        lost = flushed(chaos, run, operations, chance.randrange(30, 90), with_worker=True)
        follow_on(chaos, run, operations, reference, lost)


def flushed(
    chaos: Chaos, run: Run, operations: list[dict[str, Any]], at: int, *, with_worker: bool = False
) -> int:
    """Half the course is queued when everything in Redis goes; the seq that the run is at then."""
    ids = futures(run, operations[:at][:64])
    for first in range(64, at, 64):
        ids += futures(run, operations[first : min(first + 64, at)])
    until(lambda: chaos.applied(run.id) > at // 3 or None)
    worker = chaos.victim("worker_child", run.id)
    if with_worker:
        assert worker is not None
        # It must not put anything back between the two blows.
        worker.signal(signal.SIGSTOP)
    chaos.inside.redis.flushall()
    if with_worker:
        assert worker is not None
        kill(worker)
    state = chaos.await_status(run, "rolled_back")
    at_seq = int(state["hold"]["info"]["at_seq"])
    # Every future ends: with its answer, or because the server lost its record of it.
    for number, future in enumerate(ids, 1):
        found = until(lambda future=future: ended_or_gone(chaos, future), 30)
        if number > at_seq:
            assert found["status"] == "failed" and found["error"]["code"] == "journal_lost", found
    refused = run.post("/optim_step", {})
    assert error_of(refused, 409, "rolled_back")["data"]["at_seq"] == at_seq
    return at_seq


def ended_or_gone(chaos: Chaos, future: str) -> dict[str, Any] | None:
    answer = chaos.api.get(f"/futures/{future}")
    if answer.status_code == 410:
        return {"status": "gone"}
    assert answer.status_code in (200, 202), answer.text
    found: dict[str, Any] = answer.json()
    return found if found["status"] in ("completed", "failed", "cancelled") else None


def follow_on(
    chaos: Chaos,
    run: Run,
    operations: list[dict[str, Any]],
    reference: Reference,
    at_seq: int,
) -> None:
    """Acknowledged, the run goes on from where it is to where the undisturbed one is."""
    run.ok("/resume", {"accept": "rolled_back"})
    chaos.await_status(run, "ready")
    results = chaos.train(run, operations=again(operations[at_seq:]))
    # The course's place in the order is that of the undisturbed run, so seqs are equal too.
    equal(chaos, run, [*reference.results[:at_seq], *results], reference)


@pytest.mark.timeout(180)
def test_the_clock_jumps_an_hour_forth_and_back(
    tmp_path: Path, tiny_model: Path, reference: Reference
) -> None:
    """No lease ends, no operation is lost, no number changes, in all processes at once."""
    clock = Clock(tmp_path / "clock")
    jumps = {20: 3600, 50: 0, 80: -3600, 110: 0}

    def before(index: int) -> None:
        if index in jumps:
            clock.shift(jumps[index])
            time.sleep(1.2)  # the agent has looked at its leases by then

    with chaos_stack(tmp_path, tiny_model, **clock.environment) as chaos, chaos.run() as run:
        epoch = chaos.head(run.id)["epoch"]
        equal(chaos, run, chaos.train(run, before), reference)
        assert chaos.head(run.id)["epoch"] == epoch
        types = [row["type"] for row in run.get("/events").json()["data"]]
        assert "worker_lost" not in types
        # Redis's clock was among those that jumped.
        rows = run.get("/operations", params={"limit": 1000}).json()["data"]
        ages = [time.time() - epoch_s(row["finished_at"]) for row in rows]
        assert min(ages) < -3000 and max(ages) > 3000


def epoch_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_signal_up_is_killed_and_comes_back(
    chaos: Chaos, reference: Reference, chance: random.Random
) -> None:
    """The rest serves on without it, a worker's death included; the next `signal up` adopts all."""
    third = len(reference.results) // 3
    supervisor = chaos.supervisor()
    with chaos.run() as run:

        def before(index: int) -> None:
            if index == third:
                kill(supervisor)
            elif index == third + 10:
                worker = chaos.victim("worker_child", run.id)
                assert worker is not None
                kill(worker)
            elif index == 2 * third:
                restarted(chaos)

        equal(chaos, run, chaos.train(run, before), reference)
        assert chaos.supervisor() != supervisor


def test_processes_are_asked_to_stop(chaos: Chaos, reference: Reference) -> None:
    """SIGTERM drains: what runs ends, a snapshot is written, and the next one goes on."""
    with chaos.run() as run:

        def stop(name: str) -> None:
            victim = chaos.victim(name, run.id)
            assert victim is not None
            victim.signal(signal.SIGTERM)
            until(lambda: not victim.alive() or None, 40)
            chaos.await_whole()

        when = {20: "worker_parent", 50: "agent", 80: "web_master", 100: "projector"}
        results = chaos.train(run, lambda index: stop(when[index]) if index in when else None)
        equal(chaos, run, results, reference)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_an_operation_that_hangs(tmp_path: Path, tiny_model: Path, reference: Reference) -> None:
    """A worker that makes no progress in an operation is replaced, and blamed for nothing."""
    with chaos_stack(tmp_path, tiny_model, SIGNAL_HANG="2") as chaos, chaos.run() as run:

        def before(index: int) -> None:
            if index in (30, 70):
                chaos.points.arm("applied", "wait", when="optim_step")

        results = chaos.train(run, before)
        equal(chaos, run, results, reference)
        lost = [row for row in events_of(run) if row["type"] == "worker_lost"]
        assert len(lost) == 2


def events_of(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.get("/events", params={"limit": 1000}).json()["data"]
    return found


def test_one_tenants_memory_beside_anothers_training(chaos: Chaos, reference: Reference) -> None:
    """An operation that does not fit is done in parts; neither that run nor its neighbour changes."""
    with chaos.run(name="neighbour") as other:
        alone = essence(chaos.train(other, operations=[forward(0), forward(1)]))
    with chaos.run() as run, chaos.run(name="hungry") as hungry:
        worker = chaos.victim("worker_child", hungry.id)
        assert worker is not None

        def before(index: int) -> None:
            if index == 40:
                run_out_of_memory(hungry, worker.pid)

        results = chaos.train(run, before)
        after = chaos.train(hungry, operations=[forward(0), forward(1)])
        equal(chaos, run, results, reference)
        assert [one["loss"] for one in after] == [one["loss"] for one in alone]


def run_out_of_memory(run: Run, pid: int) -> None:
    """Leaves the worker 64 MB more than it has, and asks for more than that: it does it in smaller parts."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    room = pages * os.sysconf("SC_PAGE_SIZE") + 64 * MIB
    batch = {"batch_data": [{"tokens": [5 + i % 400 for i in range(1024)]}] * 64}
    before = resource.prlimit(pid, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    try:
        narrow = run.ok("/forward_backward", batch)
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert run.ok("/forward_backward", batch)["loss"] == pytest.approx(narrow["loss"], rel=1e-6)


def test_nothing_is_left_away(chaos: Chaos) -> None:
    """After all that, the stack serves as it did."""
    chaos.await_whole()
    with chaos.run() as run:
        assert run.ok("/forward_backward", {"batch_data": forward(0)["batch_data"]})["loss"]
