"""The pool's agent with a real Redis-protocol server, real Celery workers and a tiny real model.

One agent with two CPU slots serves the module. What happens when something dies is in test_agent_deaths.
"""

from __future__ import annotations

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
    assert host.reports()[node]["runs"] == ""


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


def test_a_model_that_cannot_be_loaded_fails_the_run_with_the_reason(host: Host) -> None:
    run_id = host.create_run(base_model="no-such-model")
    closed = host.await_closed(run_id)
    assert closed.closed == "failed"
    assert closed.close_error is not None
    assert closed.close_error["code"] == "unknown_model"
    host.await_free()


def test_only_one_agent_serves_a_data_folder(host: Host) -> None:
    until(lambda: host.reports())
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


def test_a_paused_run_frees_its_slot_and_comes_back(host: Host) -> None:
    run_id = host.create_run()
    host.await_ready(run_id)
    before = host.train(run_id, 1, 2)
    assert host.journal.hold(run_id, "paused", {"reason": "user"})
    host.await_free()
    until(lambda: host.request(run_id).state == "paused")
    assert host.happened(run_id, "paused") == [{"reason": "user"}]
    assert (host.head(run_id).worker, host.head(run_id).worker_state) == ("", "")
    time.sleep(1.0)
    assert host.slots() == [("free", None)] * 2
    assert host.journal.release(run_id, "paused")
    assert host.await_ready(run_id, after=1).epoch == 2
    assert [one["seq"] for one in before + host.train(run_id, 3, 3)] == list(range(1, 7))
    # It was snapshotted when it was paused, so nothing had to be done again.
    (rebuilt,) = host.happened(run_id, "rebuilt")
    assert (rebuilt["from_seq"], rebuilt["to_seq"], rebuilt["compared"]) == (4, 4, 0)
    assert host.happened(run_id, "worker_lost") == []
    assert host.reasons(run_id) == ["paused", None]


def test_a_run_that_is_paused_while_it_waits_lets_others_pass(host: Host) -> None:
    runs = [host.create_run() for _ in range(4)]
    for run_id in runs[:2]:
        host.await_ready(run_id)
    host.journal.hold(runs[2], "paused", {"reason": "user"})
    until(lambda: host.request(runs[2]).state == "paused")
    host.journal.close(runs[0], "cancelled")
    host.await_ready(runs[3])
    host.journal.close(runs[1], "cancelled")
    host.await_free_slots(1)
    host.journal.release(runs[2], "paused")
    assert host.await_ready(runs[2]).epoch == 1


def test_a_paused_run_that_is_cancelled_is_cleared_away(host: Host) -> None:
    run_id = host.create_run()
    host.await_ready(run_id)
    host.journal.hold(run_id, "paused", {"reason": "user"})
    until(lambda: host.request(run_id).state == "paused")
    host.journal.close(run_id, "cancelled")
    until(lambda: host.request(run_id).state == "ended")
    assert host.redis.ttl(keys.prefix(run_id) + "head") > 0


def test_a_run_moves_to_another_slot(host: Host) -> None:
    run_id = host.create_run()
    head = host.await_ready(run_id)
    assert head.device is not None
    host.train(run_id, 1, 2)
    left = head.device["slot"]
    host.journal.move(run_id, f"here/{left}")
    moved = host.await_ready(run_id, after=1)
    assert moved.device is not None
    assert moved.device["slot"] != left
    assert moved.move == ""
    assert host.happened(run_id, "moved") == [{"from": f"here/{left}"}]
    assert host.train(run_id, 3, 3)[1]["step"] == 3
    assert host.reasons(run_id) == ["moved", None]


def test_holds_that_wait_for_the_owner_keep_the_worker(host: Host) -> None:
    run_id = host.create_run()
    host.await_ready(run_id)
    assert host.journal.hold(run_id, "mismatch", {"seq": 1})
    time.sleep(1.5)
    assert ("leased", run_id) in host.slots()
    assert host.journal.release(run_id, "mismatch")
    assert host.finished(run_id, forward_backward(host, run_id)).status == "completed"
    assert host.head(run_id).epoch == 1
