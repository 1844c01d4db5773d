"""What a death costs: of a worker, of the agent, of a host, of Redis' data. Real processes throughout.

Every host here has an agent of its own. The numbers of a run that was disturbed are compared with those of
one that was not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_pool import grants, hosts, leases
from gpu_pool.devices import Slot
from gpu_pool.memory import find_counter
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
from workers.queue.app import wake

STEPS = 6


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Host]:
    """A host with one slot; its agent is still to be started."""
    with running_host(tmp_path / "data folder", slots=1) as host:
        yield host


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Host]:
    """A host with two slots; its agent is still to be started."""
    with running_host(tmp_path / "data folder", slots=2) as host:
        yield host


@pytest.fixture
def points(one: Host) -> Path:
    """The fail-points of the host with one slot."""
    folder = one.folder / "points"
    folder.mkdir()
    one.environment["SIGNAL_FAILPOINTS"] = str(folder)
    return folder


def undisturbed(host: Host) -> list[dict[str, Any]]:
    """The numbers of a run that nothing happens to."""
    run_id = host.create_run()
    host.await_ready(run_id)
    numbers = host.train(run_id, 1, STEPS)
    host.journal.close(run_id, "completed")
    host.await_free()
    return numbers


def kill(host: Host, run_id: str, victim: str = "child") -> tuple[int, int]:
    """SIGKILL to a process of the run's worker, once the run is ready; the worker's pids."""
    pids = pids_of(host, host.await_ready(run_id))
    os.kill(pids[0 if victim == "parent" else 1], signal.SIGKILL)
    return pids


# --- workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_killed_worker_costs_no_number(two: Host, victim: str) -> None:
    two.start_agent()
    expected = undisturbed(two)
    struck, other = two.create_run(), two.create_run()
    two.await_ready(struck)
    two.await_ready(other)
    numbers = two.train(struck, 1, 3)
    waiting = forward_backward(two, struck, silently=True, length=8 + 4)
    pids = kill(two, struck, victim)
    again = two.await_ready(struck, after=1)
    until(lambda: not alive(pids))
    assert again.epoch == 2
    numbers.append({k: two.result(struck, waiting)[k] for k in numbers[0]})
    step = two.result(struck, two.submit(struck, "optim_step", on_error="fail"))
    numbers.append({k: step[k] for k in numbers[1]})
    numbers += two.train(struck, 5, STEPS)
    assert numbers == expected
    (lost,) = two.happened(struck, "worker_lost")
    assert not lost["blamed"]
    assert "SIGKILL" in lost["why"]
    assert len(two.happened(struck, "rebuilt")) == 1
    assert two.reasons(struck) == ["worker_lost", None]
    assert two.head(other).epoch == 1
    assert two.finished(other, forward_backward(two, other)).status == "completed"


def test_a_worker_that_is_asked_to_stop_leaves_in_order(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    head = one.await_ready(run_id)
    one.train(run_id, 1, 2)
    os.kill(pids_of(one, head)[0], signal.SIGTERM)
    one.await_ready(run_id, after=1)
    (rebuilt,) = one.happened(run_id, "rebuilt")
    assert (rebuilt["from_seq"], rebuilt["compared"]) == (4, 0)
    assert one.train(run_id, 3, 3)[1]["step"] == 3


def test_a_spare_takes_over_although_every_slot_is_leased(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    first = one.await_ready(run_id)
    one.train(run_id, 1, 2)

    def spare() -> str | None:
        ready = {node for node, report in one.reports().items() if report["state"] == "warm"}
        return next(iter(ready - {first.worker}), None)

    node = until(spare)
    pids = kill(one, run_id)
    began = time.monotonic()
    again = one.await_ready(run_id, after=1)
    took = time.monotonic() - began
    print(f"ready again {took:.2f} s after SIGKILL")
    assert again.worker == node
    assert took < 5.0
    until(lambda: not alive(pids))
    # Another spare is made ready in its place.
    until(lambda: spare() not in (None, node))


def test_an_operation_that_kills_its_worker_three_times_is_left_out(
    one: Host, points: Path
) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 2)
    poison = None
    for crash in range(1, 4):
        (points / "received").write_text("when:sample\nsegv")
        poison = poison or sample(one, run_id, 4)
        one.await_events(run_id, "worker_lost", crash)
    assert poison is not None
    ended = one.finished(run_id, poison)
    assert ended.error is not None
    assert ended.error["code"] == "operation_crashed_worker"
    assert [lost["blamed"] for lost in one.happened(run_id, "worker_lost")] == [True] * 3
    assert one.train(run_id, 3, 3)[1]["step"] == 3


def test_an_operation_is_not_to_blame_for_what_is_done_to_its_worker(
    one: Host, points: Path
) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    number = None
    for death in range(1, 4):
        (points / "received").write_text("kill")
        number = number or forward_backward(one, run_id)
        one.await_events(run_id, "worker_lost", death)
    assert number is not None
    assert one.finished(run_id, number).status == "completed"
    assert not any(lost["blamed"] for lost in one.happened(run_id, "worker_lost"))


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    """A control group of our own, where this machine lets us make one."""
    counter = find_counter()
    folder = counter.parent / f"signal-test-{os.getpid()}" if counter is not None else None
    try:
        assert folder is not None
        folder.mkdir()
        group = MemoryGroup(folder)
    except (OSError, AssertionError, StopIteration):
        pytest.skip("a memory control group that a test may make")
    yield group
    folder.rmdir()


class MemoryGroup:
    """A memory control group, of version 1 or 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ("memory.max", "memory.current"),
        )
        self.limit, self.usage = next(
            (folder / limit, folder / usage) for limit, usage in names if (folder / limit).exists()
        )

    def allow_more(self, mib: int) -> None:
        """Its processes may use so much more than they do."""
        self.limit.write_text(str(int(self.usage.read_text()) + mib * 1024 * 1024))


def test_an_operation_that_takes_all_memory_is_left_out(
    memory_group: MemoryGroup, one: Host
) -> None:
    enter = f'echo $$ > "{memory_group.folder}/cgroup.procs" && exec "$@"'
    # Without spares, which would want memory too.
    one.start_agent("sh", "-c", enter, "sh", change="import gpu_pool.spares as s; s.SPARES = 0")
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 1)
    memory_group.allow_more(100)
    body: dict[str, Any] = {"loss_fn": "causal_lm", "loss_kwargs": {}, "accumulate": False}
    number = one.submit(run_id, "forward_backward", **body, rows=rows(*[2000] * 300))
    error = one.finished(run_id, number).error
    assert error is not None
    assert error["code"] == "operation_crashed_worker"
    lost = one.happened(run_id, "worker_lost")
    assert [loss["blamed"] for loss in lost] == [True] * 3
    assert all("memory ran out" in loss["why"] for loss in lost)
    until(lambda: one.head(run_id).applied == 3)
    assert one.train(run_id, 2, 2)[1]["step"] == 2


def test_an_operation_that_makes_no_progress_is_ended(one: Host) -> None:
    one.environment["SIGNAL_HANG"] = "4"
    one.start_agent()
    run_id = one.create_run()
    head = one.await_ready(run_id)
    number = sample(one, run_id, 1500)
    until(lambda: one.head(run_id).running == number)
    pids = pids_of(one, head)
    os.kill(pids[1], signal.SIGSTOP)
    (lost,) = one.await_events(run_id, "worker_lost", 1)
    assert lost["blamed"]
    assert "no progress" in lost["why"]
    until(lambda: not alive(pids))
    one.await_ready(run_id, after=1)
    # Not the third time: it is tried again.
    until(lambda: one.head(run_id).running == number)
    one.journal.cancel(run_id, number)
    assert one.finished(run_id, number).status == "cancelled"


def test_a_worker_killed_while_redis_is_away_is_replaced_later(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    pids = pids_of(one, one.await_ready(run_id))
    one.valkey.kill()
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not alive(pids), 5.0)
    one.valkey.start()
    one.await_ready(run_id, after=1)
    assert one.train(run_id, 1, 1)[1]["step"] == 1


def test_a_run_is_not_started_for_ever(one: Host) -> None:
    # Celery itself imports from the working folder, which is why that is an empty one of ours.
    broken = one.folder / "run" / "empty" / "workers.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise RuntimeError('broken on purpose')\n")
    one.start_agent(change="import gpu_pool.keeper as k; k.LONGEST_BACKOFF_S = 0.5")
    run_id = one.create_run()
    until(lambda: one.head(run_id).closed, 90)
    error = one.head(run_id).close_error
    assert error is not None
    assert error["code"] == "worker_start_failed"
    assert "broken on purpose" in error["message"]
    one.await_free()
    assert one.reasons(run_id) == ["worker_start_failed"] * 5


def test_a_worker_that_cannot_be_started_now_is_started_later(one: Host) -> None:
    (one.folder / "logs").write_text("a file where the folder of logs should be")
    one.start_agent()
    run_id = one.create_run()
    until(lambda: one.request(run_id).epoch >= 2)
    (one.folder / "logs").unlink()
    one.await_ready(run_id)


# --- the agent --------------------------------------------------------------------------------


def test_the_agents_death_ends_no_worker(one: Host) -> None:
    one.start_agent()
    expected = undisturbed(one)
    run_id = one.create_run()
    head = one.await_ready(run_id)
    pids = pids_of(one, head)
    numbers = one.train(run_id, 1, 2)
    one.stop_agent(signal.SIGKILL)
    numbers += one.train(run_id, 3, 4)
    silent = forward_backward(one, run_id, silently=True, length=8 + 5)
    one.start_agent()
    # Adopted, and no ring is lost.
    numbers.append({k: one.result(run_id, silent)[k] for k in numbers[0]})
    now = one.head(run_id)
    assert (now.epoch, now.worker) == (head.epoch, head.worker)
    assert alive(pids) == list(pids)
    # What it adopted it also watches.
    os.kill(pids[1], signal.SIGKILL)
    one.await_ready(run_id, after=1)
    until(lambda: not alive(pids))
    step = one.result(run_id, one.submit(run_id, "optim_step", on_error="fail"))
    numbers.append({k: step[k] for k in numbers[1]})
    assert [*numbers, *one.train(run_id, 6, STEPS)] == expected
    assert one.reasons(run_id) == ["worker_lost", None]


def test_a_worker_that_died_with_the_agent_is_replaced(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    pids = pids_of(one, one.await_ready(run_id))
    one.stop_agent(signal.SIGKILL)
    os.killpg(pids[0], signal.SIGKILL)
    until(lambda: not alive(pids))
    one.start_agent()
    one.await_ready(run_id, after=1)
    (lost,) = one.happened(run_id, "worker_lost")
    assert not lost["blamed"]


@pytest.mark.parametrize("stage", ["agent.leased", "agent.placed", "agent.attached"])
def test_an_agent_that_dies_while_it_gives_a_slot_away(one: Host, points: Path, stage: str) -> None:
    (points / stage).write_text("kill")
    one.start_agent()
    run_id = one.create_run()
    assert one.agent is not None
    assert one.agent.wait(40) == -signal.SIGKILL
    one.start_agent()
    one.await_ready(run_id)
    assert one.train(run_id, 1, 1)[1]["step"] == 1


def test_what_no_agent_knows_is_ended(one: Host) -> None:
    """A worker whose lease is over, a worker of a slot that is gone, and one that was never recorded."""
    one.start_agent()
    run_id = one.create_run()
    pids = pids_of(one, one.await_ready(run_id))
    one.stop_agent(signal.SIGKILL)
    with one.database.writing() as session:
        (lease,) = leases.open_leases(session, "here")
        leases.requeue(session, lease, "host_lost")
    env = {**os.environ, "SIGNAL_WORKER_OF": str(one.folder)}
    with subprocess.Popen(["sleep", "60"], env=env, start_new_session=True) as stray:
        one.start_agent()
        assert stray.wait(30) == -signal.SIGKILL
    until(lambda: not alive(pids))
    assert one.await_ready(run_id, after=1).epoch == 2


def test_the_worker_of_a_slot_that_is_gone_is_ended(two: Host) -> None:
    two.start_agent()
    runs = [two.create_run(), two.create_run()]
    heads = {run_id: two.await_ready(run_id) for run_id in runs}
    pids = {run_id: pids_of(two, head) for run_id, head in heads.items()}
    two.stop_agent(signal.SIGKILL)
    two.devices = "cpu:1x1"
    two.start_agent()
    kept, moved = sorted(runs, key=lambda run_id: heads[run_id].device["slot"])  # type: ignore[index]
    until(lambda: not alive(pids[moved]))
    assert alive(pids[kept]) == list(pids[kept])
    assert two.head(kept).epoch == 1
    until(lambda: two.request(moved).state == "queued")
    two.journal.close(kept, "completed")
    assert two.await_ready(moved, after=1).epoch == 2


def test_sigterm_drains_and_the_next_agent_goes_on(one: Host) -> None:
    one.start_agent()
    expected = undisturbed(one)
    run_id = one.create_run()
    one.await_ready(run_id)
    numbers = one.train(run_id, 1, 3)
    pids = [int(r[name]) for r in one.reports().values() for name in ("pid", "parent_pid")]
    began = time.monotonic()
    assert one.stop_agent() == 0
    print(f"drained in {time.monotonic() - began:.2f} s")
    assert alive(pids) == []
    assert one.slots() == [("down", None)]
    assert one.reports() == {}
    head = one.head(run_id)
    assert (head.closed, head.worker, head.worker_state) == ("", "", "")
    assert head.snapshot is not None
    assert head.snapshot.seq == head.applied == 6
    assert one.request(run_id).state == "queued"
    waiting = forward_backward(one, run_id, length=8 + 4)
    one.start_agent()
    numbers.append({k: one.result(run_id, waiting)[k] for k in numbers[0]})
    step = one.result(run_id, one.submit(run_id, "optim_step", on_error="fail"))
    numbers.append({k: step[k] for k in numbers[1]})
    assert [*numbers, *one.train(run_id, 5, STEPS)] == expected
    assert one.happened(run_id, "worker_lost") == []
    (rebuilt,) = one.happened(run_id, "rebuilt")
    assert rebuilt["compared"] == 0
    assert one.reasons(run_id) == ["drained", None]


def test_a_drain_does_not_wait_for_a_sample(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 1)
    number = sample(one, run_id, 1900)
    until(lambda: one.head(run_id).running == number)
    began = time.monotonic()
    assert one.stop_agent() == 0
    assert time.monotonic() - began < 10
    head = one.head(run_id)
    assert (head.applied, head.running, head.snapshot and head.snapshot.seq) == (2, None, 2)
    one.start_agent()
    until(lambda: one.head(run_id).running == number)
    one.journal.cancel(run_id, number)
    assert one.finished(run_id, number).status == "cancelled"


def test_a_worker_that_does_not_stop_is_killed_and_its_run_goes_on(one: Host) -> None:
    one.start_agent(change="import gpu_pool.draining as d; d.DRAIN_S = 2.0")
    run_id = one.create_run()
    pids = pids_of(one, one.await_ready(run_id))
    os.kill(pids[1], signal.SIGSTOP)
    assert one.stop_agent() == 0
    assert alive(pids) == []
    assert one.request(run_id).state == "queued"
    (lost,) = one.happened(run_id, "worker_lost")
    assert not lost["blamed"]
    one.start_agent()
    one.await_ready(run_id, after=1)


# --- idleness ---------------------------------------------------------------------------------


def test_an_idle_run_makes_room_for_one_that_waits(one: Host) -> None:
    one.environment["SIGNAL_IDLE_PAUSE"] = "1.5"
    one.start_agent()
    first = one.create_run()
    one.await_ready(first)
    one.train(first, 1, 1)
    time.sleep(2.5)
    assert one.head(first).hold == ""
    second = one.create_run()
    one.await_ready(second)
    assert one.happened(first, "paused") == [{"reason": "idle"}]
    # What is submitted to it resumes it: in its turn, when the other has been idle.
    number = forward_backward(one, first)
    assert one.finished(first, number).status == "completed"
    assert one.head(second).hold == "paused"


def test_a_run_that_is_idle_for_long_frees_its_slot_for_nobody(one: Host) -> None:
    one.environment["SIGNAL_IDLE_PAUSE"] = "0.5"
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    until(lambda: one.request(run_id).state == "paused", 10)
    assert one.slots() == [("free", None)]
    assert one.finished(run_id, forward_backward(one, run_id)).status == "completed"


# --- Redis' data, hosts -----------------------------------------------------------------------


def test_a_flushed_redis_is_mended_by_the_living_worker(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    before = one.await_ready(run_id)
    one.train(run_id, 1, 3)
    redis: Any = one.redis
    redis.flushall()
    # Its seq is known as soon as there is a journal again; what is put back follows.
    until(lambda: (head := one.journal.head(run_id)) and head.applied == 6)
    head = one.head(run_id)
    assert (head.hold, head.hold_info) == ("rolled_back", {"at_seq": 6})
    assert (head.applied, head.epoch, head.worker) == (6, before.epoch, before.worker)
    assert one.journal.release(run_id, "rolled_back")
    assert one.train(run_id, 4, 4)[1]["step"] == 4


def test_a_flushed_redis_and_no_worker_leave_the_newest_snapshot(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 3)
    one.journal.hold(run_id, "paused", {"reason": "user"})
    until(lambda: one.request(run_id).state == "paused")
    waiting = one.create_run()
    one.await_ready(waiting)
    with one.database.writing() as session:
        request = session.merge(one.request(run_id))
        request.requested_at = request.requested_at.replace(year=2025)
    one.journal.erase(run_id)
    head = until(lambda: one.journal.head(run_id))
    assert (head.hold, head.hold_info) == ("rolled_back", {"at_seq": 6})
    one.journal.close(waiting, "cancelled")
    assert one.request(run_id).state == "paused"
    assert one.journal.release(run_id, "rolled_back")
    one.await_ready(run_id)
    assert one.train(run_id, 4, 4)[1]["step"] == 4


def test_a_flushed_redis_and_a_killed_worker_at_once(one: Host) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 3)
    with one.database.writing() as session:
        request = session.merge(one.request(run_id))
        request.requested_at = request.requested_at.replace(year=2025)
    snapshot = one.head(run_id).snapshot
    known = snapshot.seq if snapshot is not None else 0
    kill(one, run_id)
    redis: Any = one.redis
    redis.flushall()
    head = until(lambda: one.journal.head(run_id))
    assert head.hold == "rolled_back"
    at_seq = head.hold_info["at_seq"]
    assert known <= at_seq == head.applied <= 6
    one.await_ready(run_id, after=1)
    assert one.journal.release(run_id, "rolled_back")
    step = 1 + at_seq // 2
    assert one.train(run_id, step, step)[1]["seq"] == at_seq + 2


@pytest.mark.parametrize("mended", [False, True])
def test_a_run_that_has_ended_does_not_come_back_when_redis_is_flushed(
    one: Host, mended: bool
) -> None:
    one.start_agent()
    run_id = one.create_run()
    one.await_ready(run_id)
    one.train(run_id, 1, 1)
    if mended:
        one.stop_agent(signal.SIGKILL)
    # SQL has been told that it is over; nobody else will be.
    with one.database.writing() as session:
        leases.withdraw(session, run_id)
    redis: Any = one.redis
    redis.flushall()
    if mended:
        wake(one.app, run_id)
        until(lambda: one.journal.head(run_id))
        one.start_agent()
    one.await_free()
    until(lambda: one.request(run_id).state == "ended")
    head = one.journal.head(run_id)
    assert head is None or head.closed
    one.await_ready(one.create_run())


def test_the_run_of_a_lost_host_goes_on_here(one: Host) -> None:
    with one.database.writing() as session:
        hosts.register(session, "gone", [Slot("cpu0", "cpu", "CPU", 1 << 30, 1)])
    run_id = one.create_run()
    with one.database.writing() as session:
        lease = grants.acquire(session, "gone")
        assert lease is not None
        hosts.take_down(session, "gone")
    one.journal.install_epoch(run_id, lease.epoch, "cpu0-dead@gone", {"host": "gone"})
    one.start_agent()
    head = one.await_ready(run_id, after=1)
    assert head.epoch == 2
    (lost,) = one.happened(run_id, "worker_lost")
    assert "host gone" in lost["why"]
    assert not lost["blamed"]


def test_a_lease_that_is_over_is_given_up(one: Host) -> None:
    """As when another agent took this host for lost: its own agent sees that in SQL."""
    one.start_agent()
    run_id = one.create_run()
    pids = pids_of(one, one.await_ready(run_id))
    with one.database.writing() as session:
        (lease,) = leases.open_leases(session, "here")
        leases.requeue(session, lease, "host_lost", "paused")
    one.journal.hold(run_id, "mismatch", {})  # so that it is not leased again at once
    until(lambda: all(report["runs"] == "" for report in one.reports().values()), 15)
    assert alive(pids) == list(pids)
    one.journal.release(run_id, "mismatch")
    one.await_ready(run_id, after=1)
