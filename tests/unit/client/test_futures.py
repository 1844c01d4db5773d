"""Futures and the threads that wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _poller
from tests.unit.client.wire import RUN, TIMINGS, Journal, Wire, refusal, reply

BATCH = [{"text": "a"}]


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def client(journal: Journal) -> Iterator[rs.SignalClient]:
    with journal.client() as found:
        yield found


@pytest.fixture
def run(client: rs.SignalClient) -> rs.SignalRun:
    return client.run("run_0123456789abcdef")


def test_result(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    assert future.seq == 1
    assert not future.done()
    assert future.status().status == "pending"
    journal.finish()
    assert future.result(5).timings.execute_ms == TIMINGS["execute_ms"]
    assert future.done()
    assert future.status().status == "completed"
    assert future.exception() is None


def test_wait_begins_before_the_end(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    threading.Timer(0.1, journal.finish).start()
    assert future.result(5).seq == 1


def test_timeout_then_result(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    with pytest.raises(rs.SignalTimeoutError, match="fut_1"):
        future.result(timeout=0.05)
    with pytest.raises(TimeoutError):
        future.result(timeout=0)
    journal.finish()
    assert future.result(5).seq == 1


def test_failure(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    journal.finish(code="no_gradients", message="None there.", retryable=False)
    with pytest.raises(rs.OperationConflictError, match="None there") as caught:
        future.result(5)
    assert caught.value.code == "no_gradients"
    assert caught.value.request_id == "req_1"
    assert isinstance(future.exception(), rs.OperationFailedError)


def test_cancelled(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    journal.cancel(0)
    with pytest.raises(rs.OperationCancelledError):
        future.result(5)


def test_expired_result(journal: Journal, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    journal.finish()
    journal.futures[0].update(result=None, error={"code": "future_expired"})
    with pytest.raises(rs.NotFoundError) as caught:
        future.result(5)
    assert caught.value.code == "future_expired"


@pytest.mark.parametrize(
    ("answer", "cancelled"),
    [(reply({"status": "cancelled"}), True), (refusal(409, "already_running"), False)],
)
def test_cancel(answer: httpx2.Response, cancelled: bool) -> None:
    future = {"future_id": "fut_1", "run_id": RUN["run_id"], "kind": "sample", "seq": 1}
    wire = Wire(reply({**future, "status": "pending"}), answer)
    with wire.client() as client:
        assert client.future("fut_1").cancel() is cancelled
    assert wire.requests[-1].method == "DELETE"


def test_future_found_again(journal: Journal, client: rs.SignalClient, run: rs.SignalRun) -> None:
    run.optim_step_async()
    again = client.future("fut_1")
    journal.finish()
    assert again.result(5).seq == 1
    assert client.future("fut_1").settled


def test_wait_all_is_a_few_polls(journal: Journal, run: rs.SignalRun) -> None:
    futures = run.submit({"kind": "optim_step"} for _ in range(1000))
    threading.Timer(0.1, journal.finish, [1000]).start()
    results = rs.wait_all(futures, timeout=10)
    assert [result.seq for result in results] == list(range(1, 1001))
    assert len(journal.polls) <= 2 + 1000 // 100


def test_wait_all_raises_the_first_error_after_all_have_ended(
    journal: Journal, run: rs.SignalRun
) -> None:
    futures = [run.optim_step_async() for _ in range(3)]
    journal.finish()
    journal.finish(code="no_gradients", message="second")
    journal.finish(code="worker_lost", message="third")
    with pytest.raises(rs.OperationFailedError, match="second"):
        rs.wait_all(futures, timeout=5)
    assert all(future.settled for future in futures)


def test_wait_all_in_time_or_not(journal: Journal, run: rs.SignalRun) -> None:
    futures = [run.optim_step_async() for _ in range(2)]
    journal.finish()
    with pytest.raises(rs.SignalTimeoutError):
        rs.wait_all(futures, timeout=0.2)
    assert rs.wait_all([], timeout=0) == []


def test_reading_in_order_asks_for_what_follows(journal: Journal, run: rs.SignalRun) -> None:
    futures = run.submit({"kind": "optim_step"} for _ in range(400))
    journal.finish(400)
    assert [future.result(5).seq for future in futures] == list(range(1, 401))
    assert len(journal.polls) <= 20


def test_waiting_for_a_late_one_is_not_woken_by_earlier_ones(
    journal: Journal, run: rs.SignalRun
) -> None:
    futures = [run.optim_step_async() for _ in range(5)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(futures[3].result, 5)
        for _ in range(5):
            time.sleep(0.02)
            journal.finish()
        waiting.result()
    assert journal.polls == [["fut_4", "fut_5"]]


def test_threads_that_wait_share_the_polls(journal: Journal, run: rs.SignalRun) -> None:
    futures = run.submit({"kind": "optim_step"} for _ in range(60))
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(future.result, 10) for future in futures]
        time.sleep(0.2)
        journal.finish(60)
        assert sorted(one.result().seq for one in waiting) == list(range(1, 61))
    assert len(journal.polls) <= 10


def test_runs_are_polled_side_by_side(journal: Journal, client: rs.SignalClient) -> None:
    runs = [client.run(f"run_{index:016x}") for index in range(_poller.MAX_THREADS + 2)]
    futures = [run.optim_step_async() for run in runs]
    with ThreadPoolExecutor(len(runs)) as pool:
        waiting = [pool.submit(future.result, 10) for future in futures]
        time.sleep(0.2)
        assert client._poller._threads == _poller.MAX_THREADS
        journal.finish()
        assert waiting[0].result(1).seq == 1
        journal.finish(len(runs))
        assert [one.result().seq for one in waiting] == list(range(1, len(runs) + 1))


def test_threads_end_when_nobody_waits(
    journal: Journal, run: rs.SignalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_poller, "IDLE_S", 0.05)
    future = run.optim_step_async()
    journal.finish()
    future.result(5)
    deadline = time.monotonic() + 5
    while run._poller._threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run._poller._threads == 0
    second = run.optim_step_async()
    journal.finish()
    assert second.result(5).seq == 2


def test_one_lost_future_does_not_hide_the_others(journal: Journal, run: rs.SignalRun) -> None:
    futures = [run.optim_step_async() for _ in range(3)]
    journal.finish(3)
    journal.futures[1]["future_id"] = "forgotten"
    with pytest.raises(rs.NotFoundError):
        rs.wait_all(futures, timeout=5)
    assert futures[0].result(5).seq == 1
    assert futures[2].result(5).seq == 3


def test_error_of_a_poll_reaches_who_waits_and_can_be_tried_again() -> None:
    pending = {"future_id": "fut_1", "run_id": RUN["run_id"], "kind": "optim_step", "seq": 1}
    done = {**pending, "status": "completed", "result": {"seq": 1}, "error": None}
    wire = Wire(reply({**pending, "status": "pending"}), refusal(401, "unauthorized"), reply(done))
    with wire.client() as client:
        future = client.future("fut_1")
        with pytest.raises(rs.AuthenticationError):
            future.result(5)
        assert future.result(5).seq == 1


def test_closing_the_client_wakes_who_waits(client: rs.SignalClient, run: rs.SignalRun) -> None:
    future = run.optim_step_async()
    threading.Timer(0.1, client.close).start()
    with pytest.raises(rs.SignalConnectionError, match="closed"):
        future.result(5)
