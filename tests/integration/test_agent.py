"""The pool's agent with a real Redis-protocol server, real Celery workers and a tiny real model.

One agent with two CPU slots serves the module. What happens when something dies is in test_agent_deaths.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from gpu_pool import leases
from tests.support.host import (
    Host,
    forward_backward,
    running_host,
    until,
)
from workers.queue import keys


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running_host(tmp_path_factory.mktemp("pool") / "data folder", slots=2) as host:
        host.start_agent()
        yield host


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """The shared host, with no run on it before and after the test."""
    yield shared
    for run_id in shared.journal.open_runs():
        shared.journal.close(run_id, "cancelled")
    shared.await_free()


@pytest.fixture
def own_host(tmp_path: Path) -> Iterator[Host]:
    """A host with one slot that the test may break; its agent is still to be started."""
    with running_host(tmp_path / "data folder", slots=1) as host:
        yield host


def test_a_run_gets_a_worker_and_trains(host: Host) -> None:
    run_id = host.create_run()
    head = host.await_ready(run_id)
    assert head.epoch == 1
    assert head.device is not None
    assert (head.device["host"], head.device["kind"]) == ("here", "cpu")
    assert ("leased", run_id) in host.slots()
    numbers = [forward_backward(host, run_id), host.submit(run_id, "optim_step", on_error="fail")]
    assert [host.finished(run_id, number).status for number in numbers] == ["completed"] * 2
    assert host.head(run_id).state["step"] == 1


def test_a_run_that_ends_leaves_the_slot_free_and_the_broker_clean(host: Host) -> None:
    run_id = host.create_run()
    node = host.await_ready(run_id).worker
    number = host.submit(run_id, "complete", save=False, name=None)
    assert host.finished(run_id, number).status == "completed"
    host.await_free()
    assert host.head(run_id).closed == "completed"
    assert host.broker_keys(run_id) == []
    assert 0 < host.redis.ttl(keys.prefix(run_id) + "head") <= host.settings.result_ttl_s
    assert host.reports()[node]["run"] == ""


def test_a_warm_worker_serves_the_next_run_at_once(host: Host) -> None:
    first = host.create_run()
    node = host.await_ready(first).worker
    host.journal.close(first, "cancelled")
    host.await_free()
    began = time.monotonic()
    head = host.await_ready(host.create_run())
    took = time.monotonic() - began
    # The same worker, because it holds the model: placement prefers it to one that does not.
    assert head.worker == node
    assert took < 2.0


def test_runs_wait_their_turn(host: Host) -> None:
    runs = [host.create_run() for _ in range(4)]
    for run_id in runs[:2]:
        host.await_ready(run_id)
    with host.database.reading() as session:
        positions = [leases.queue_position(session, run_id) for run_id in runs]
    assert positions == [None, None, 0, 1]
    waiting = forward_backward(host, runs[3])
    host.journal.close(runs[2], "cancelled")
    host.journal.close(runs[0], "cancelled")
    assert host.finished(runs[3], waiting).status == "completed"


def test_a_run_cancelled_while_it_waits_is_cleared_away(host: Host) -> None:
    runs = [host.create_run() for _ in range(3)]
    for run_id in runs[:2]:
        host.await_ready(run_id)
    forward_backward(host, runs[2])
    assert host.broker_keys(runs[2])
    host.journal.close(runs[2], "cancelled")
    until(lambda: not host.broker_keys(runs[2]))
    with host.database.reading() as session:
        assert leases.queue_position(session, runs[2]) is None
    until(lambda: host.redis.ttl(keys.prefix(runs[2]) + "head") > 0)


def test_a_lost_doorbell_is_rung_again(host: Host) -> None:
    run_id = host.create_run()
    host.await_ready(run_id)
    number = forward_backward(host, run_id, silently=True)
    began = time.monotonic()
    assert host.finished(run_id, number).status == "completed"
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_killed_worker_fails_its_run_and_nothing_else(host: Host, victim: str) -> None:
    struck, other = host.create_run(), host.create_run()
    head = host.await_ready(struck)
    host.await_ready(other)
    pids = pids_of(host, head)
    number = forward_backward(host, struck, silently=True)
    os.kill(pids[0 if victim == "parent" else 1], signal.SIGKILL)
    began = time.monotonic()
    closed = host.await_closed(struck)
    assert time.monotonic() - began < 2.0
    assert closed.closed == "failed"
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"
    ended = host.finished(struck, number)
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"
    until(lambda: not alive(pids))
    assert host.finished(other, forward_backward(host, other)).status == "completed"
    next_run = host.create_run()
    host.await_ready(next_run)
    assert host.broker_keys(struck) == []


def test_a_model_that_cannot_be_loaded_fails_the_run_with_the_reason(host: Host) -> None:
    run_id = host.create_run(base_model="no-such-model")
    closed = host.await_closed(run_id)
    assert closed.closed == "failed"
    assert closed.close_error is not None
    assert closed.close_error["code"] == "unknown_model"
    host.await_free()


def test_only_one_agent_serves_a_data_folder(host: Host) -> None:
    until(lambda: len(host.reports()) == 2)
    first = host.agent
    assert first is not None
    host.start_agent()
    assert host.agent is not None
    refused, host.agent = host.agent, first
    assert refused.wait(30) == 2
    assert first.poll() is None
    assert "another pool agent" in (host.folder / "agent.log").read_text()


def test_an_absent_redis_costs_no_lease(host: Host) -> None:
    run_id = host.create_run()
    before = host.await_ready(run_id)
    host.valkey.kill()
    time.sleep(3.0)
    host.valkey.start()
    number = forward_backward(host, run_id)
    assert host.finished(run_id, number).status == "completed"
    after = host.head(run_id)
    assert (after.epoch, after.worker, after.closed) == (before.epoch, before.worker, "")
    host.await_ready(host.create_run())


def test_a_worker_killed_while_redis_is_away_is_told_later(host: Host) -> None:
    run_id = host.create_run()
    pids = pids_of(host, host.await_ready(run_id))
    host.valkey.kill()
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not alive(pids), 5.0)
    host.valkey.start()
    closed = host.await_closed(run_id)
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"


def test_a_worker_that_dies_at_its_start_fails_the_run_with_its_last_words(own_host: Host) -> None:
    # Celery itself imports from the working folder, which is why that is an empty one of ours.
    broken = own_host.folder / "run" / "empty" / "workers.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise RuntimeError('broken on purpose')\n")
    own_host.start_agent()
    closed = own_host.await_closed(own_host.create_run())
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_start_failed"
    assert "broken on purpose" in closed.close_error["message"]
    broken.unlink()
    own_host.await_ready(own_host.create_run())


def test_sigterm_leaves_no_process_and_frees_the_slots(own_host: Host) -> None:
    own_host.start_agent()
    run_id = own_host.create_run()
    head = own_host.await_ready(run_id)
    until(lambda: len(own_host.reports()) == 1)
    pids = [int(r[name]) for r in own_host.reports().values() for name in ("pid", "parent_pid")]
    assert own_host.stop_agent() == 0
    assert alive(pids) == []
    assert own_host.slots() == [("down", None)]
    assert own_host.head(run_id).closed == "failed"
    assert own_host.reports() == {}
    assert own_host.broker_keys(run_id) == []
    assert head.worker


def test_the_next_agent_ends_what_a_killed_one_left(own_host: Host) -> None:
    own_host.start_agent()
    run_id = own_host.create_run()
    pids = pids_of(own_host, own_host.await_ready(run_id))
    own_host.stop_agent(signal.SIGKILL)
    # Workers outlive their agent: the run goes on as long as nobody takes over.
    assert own_host.finished(run_id, forward_backward(own_host, run_id)).status == "completed"
    own_host.start_agent()
    closed = own_host.await_closed(run_id)
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_lost"
    until(lambda: not alive(pids))
    own_host.await_ready(own_host.create_run())


def test_a_worker_that_cannot_be_started_at_all_fails_the_run(own_host: Host) -> None:
    (own_host.folder / "logs").write_text("a file where the folder of logs should be")
    own_host.start_agent()
    closed = own_host.await_closed(own_host.create_run())
    assert closed.close_error is not None
    assert closed.close_error["code"] == "worker_start_failed"
    (own_host.folder / "logs").unlink()
    own_host.await_ready(own_host.create_run())
