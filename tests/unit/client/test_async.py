"""Futures and calls in event loops: one after the other, given up, closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _async_base
from tests.unit.client.wire import RUN, Journal, Wire, refusal, reply

RUN_ID = str(RUN["run_id"])
BATCH = [{"text": "a"}]
V = TypeVar("V")


def in_loop(work: Coroutine[Any, Any, V]) -> V:
    """`work` in a loop of its own, for ten seconds at most."""

    async def bounded() -> V:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


@pytest.fixture
def journal() -> Journal:
    return Journal()


def nobody_waits(client: rs.SignalClient) -> bool:
    poller = client._poller
    return not (poller._waiters or poller._watchers or poller._errors)


def test_double_await(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            future = await run.optim_step_async()
            assert (future.seq, future.settled) == (1, False)
            threading.Timer(0.05, journal.finish).start()
            assert (await future).seq == 1
            assert (await future).seq == future.result().seq == 1

    in_loop(work())


def test_awaiting_a_call_is_its_result(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            waiting = asyncio.ensure_future(run.forward_backward(BATCH))
            while not journal.futures:
                await asyncio.sleep(0.01)
            journal.answer_with({"loss": 2.5})
            assert (await waiting)["loss"] == 2.5

    in_loop(work())


def test_several_loops_one_after_the_other(journal: Journal) -> None:
    client = journal.async_client()

    async def work() -> int | None:
        run = await client.run(RUN_ID)
        future = await run.optim_step_async()
        journal.finish()
        return (await future).seq

    assert [in_loop(work()) for _ in range(3)] == [1, 2, 3]
    in_loop(client.close())


def test_a_future_of_one_loop_is_awaited_in_another(journal: Journal) -> None:
    client = journal.async_client()

    async def submit() -> rs.APIFuture[Any]:
        return await (await client.run(RUN_ID)).optim_step_async()

    async def wait(future: rs.APIFuture[Any]) -> int | None:
        return (await future).seq

    future = in_loop(submit())
    threading.Timer(0.05, journal.finish).start()
    assert in_loop(wait(future)) == 1
    in_loop(client.close())


def test_two_loops_and_a_thread_wait_for_one_future(journal: Journal) -> None:
    with journal.client() as client:
        future = client.run(RUN_ID).optim_step_async()
        seqs: list[int | None] = []

        async def wait() -> None:
            seqs.append((await future).seq)

        work = [lambda: in_loop(wait()), lambda: in_loop(wait())]
        threads = [threading.Thread(target=one) for one in work]
        threads.append(threading.Thread(target=lambda: seqs.append(future.result(10).seq)))
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        journal.finish()
        for thread in threads:
            thread.join(10)
        assert seqs == [1, 1, 1]
        assert nobody_waits(client)


def test_a_loop_goes_on_while_a_future_is_awaited(journal: Journal) -> None:
    async def work() -> None:
        with journal.client() as client:
            future = client.run(RUN_ID).optim_step_async()
            waiting = asyncio.ensure_future(_result(future))
            for _ in range(5):
                await asyncio.sleep(0.01)
            assert not waiting.done()
            journal.finish()
            assert await waiting == 1

    in_loop(work())


async def _result(future: rs.APIFuture[Any]) -> int | None:
    return (await future).seq


def test_a_held_back_future_is_sent_by_its_await(journal: Journal) -> None:
    async def work() -> None:
        with journal.client() as client, client.run(RUN_ID).pipeline() as pipe:
            future = pipe.optim_step()
            waiting = asyncio.ensure_future(_result(future))
            while not journal.futures:
                await asyncio.sleep(0.01)
            journal.finish()
            assert await waiting == 1

    in_loop(work())


def test_a_wait_that_ran_out_of_time_is_repeated_and_leaves_nothing(journal: Journal) -> None:
    async def work() -> None:
        with journal.client() as client:
            future = client.run(RUN_ID).optim_step_async()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(_result(future), 0.02)
                assert nobody_waits(client)
            journal.finish()
            assert (await future).seq == 1

    in_loop(work())


def test_cancelled_awaits_leave_nothing_in_the_poller(journal: Journal) -> None:
    async def work() -> None:
        with journal.client() as client:
            futures = client.run(RUN_ID).submit({"kind": "optim_step"} for _ in range(200))
            tasks = [asyncio.ensure_future(_result(future)) for future in futures]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
            assert nobody_waits(client)

    in_loop(work())


def test_an_await_raises_what_result_raises(journal: Journal) -> None:
    async def work() -> None:
        with journal.client() as client:
            future = client.run(RUN_ID).optim_step_async()
            journal.finish(code="no_gradients", message="None there.")
            with pytest.raises(rs.OperationConflictError, match="None there"):
                await future

    in_loop(work())


def test_closing_the_client_wakes_who_awaits(journal: Journal) -> None:
    async def work() -> None:
        client = journal.async_client()
        future = await (await client.run(RUN_ID)).optim_step_async()
        waiting = asyncio.ensure_future(_result(future))
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(rs.SignalConnectionError, match="closed"):
            await waiting

    in_loop(work())


def test_a_closed_client_says_so_to_every_call(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
        for call in (run.optim_step, run.optim_step_async, run.status, client.models):
            with pytest.raises(rs.SignalConnectionError, match="closed"):
                await call()

    in_loop(work())


def test_calls_that_were_queued_when_the_client_closed_are_refused_and_not_cancelled(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_async_base, "MAX_THREADS", 1)
    wait = threading.Event()

    def slow(request: httpx2.Request) -> httpx2.Response:
        wait.wait(5)
        return journal.answer(request)

    async def work() -> list[Any]:
        client = Wire(slow).async_client()
        calls = [asyncio.ensure_future(client.run(RUN_ID)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await client.close()
        wait.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(one, rs.SignalConnectionError) for one in in_loop(work())[1:])


def test_leaving_the_block_well_completes_and_badly_pauses() -> None:
    async def work() -> None:
        wire = Wire(reply(RUN), reply({"status": "completed"}), reply(RUN))
        async with wire.async_client() as client:
            async with await client.run(RUN_ID):
                pass
            with pytest.raises(RuntimeError, match="mine"):
                async with await client.run(RUN_ID):
                    raise RuntimeError("mine")
        assert [one.url.path.rsplit("/", 1)[1] for one in wire.requests] == [
            RUN_ID,
            "complete",
            RUN_ID,
            "pause",
        ]

    in_loop(work())


def test_pages_are_fetched_as_the_loop_asks() -> None:
    page = {"data": [RUN, RUN], "has_more": True, "next_cursor": "c1"}
    wire = Wire(reply(page), reply({"data": [RUN], "has_more": False, "next_cursor": None}))

    async def work() -> None:
        async with wire.async_client() as client:
            listed = client.list_runs()
            assert (await anext(listed)).run_id == RUN_ID
            assert len(wire.requests) == 1
            assert [run.run_id async for run in listed] == [RUN_ID] * 2

    in_loop(work())


def test_an_iteration_that_is_cancelled_in_a_step_is_cancelled() -> None:
    began, wait = threading.Event(), threading.Event()

    def slow(request: httpx2.Request) -> httpx2.Response:
        began.set()
        wait.wait(5)
        return reply({"data": [], "has_more": False, "next_cursor": None})

    async def work() -> None:
        async with Wire(slow).async_client() as client:
            task = asyncio.ensure_future(_collected(client))
            await asyncio.to_thread(began.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            wait.set()

    in_loop(work())


async def _collected(client: rs.AsyncSignalClient) -> list[Any]:
    return [run async for run in client.list_runs()]


def test_calls_by_run_id_keep_their_order_in_one_lane(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            futures = await asyncio.gather(
                *(
                    call
                    for _ in range(10)
                    for call in (
                        client.forward_backward_async(RUN_ID, BATCH, loss_kwargs={"beta": 0.1}),
                        client.optim_step_async(RUN_ID, 1e-3),
                    )
                )
            )
            assert [future.seq for future in futures] == list(range(1, 21))
            blocking = [
                asyncio.ensure_future(client.save_state(RUN_ID)),
                asyncio.ensure_future(client.optim_step(RUN_ID)),
                asyncio.ensure_future(client.sample(RUN_ID, "a")),
            ]
            while len(journal.futures) < 23:
                await asyncio.sleep(0.01)
            journal.finish(22)
            journal.answer_with({"samples": [[{"text": "b", "token_ids": [1]}]]})
            assert (await asyncio.gather(*blocking))[2] == ["b"]
        kinds = [kind for kind, _ in journal.bodies]
        assert kinds == ["forward_backward", "optim_step"] * 10 + [
            "save_state",
            "optim_step",
            "sample",
        ]

    in_loop(work())


def test_a_branch_and_a_found_run_are_asynchronous_too() -> None:
    async def work() -> None:
        async with Wire(reply({**RUN, "run_id": "run_b"}, 201)).async_client() as client:
            branch = await (await client.create_run("tiny")).branch(4)
            assert isinstance(branch, rs.AsyncSignalRun)
            assert branch.run_id == "run_b"
            assert repr(branch) == "<AsyncSignalRun run_b tiny ready>"

    in_loop(work())


# Callbacks.


def test_callback_before_and_after_the_end(journal: Journal) -> None:
    with journal.client() as client:
        future = client.run(RUN_ID).optim_step_async()
        called: list[Any] = []
        heard = threading.Event()
        future.add_done_callback(lambda one: (called.append(one), heard.set()))
        assert not called
        journal.finish()
        assert heard.wait(5)
        future.add_done_callback(called.append)
        assert called == [future, future]
        assert nobody_waits(client)


def test_a_callback_that_fails_hinders_no_other(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    with journal.client() as client:
        future = client.run(RUN_ID).optim_step_async()
        heard = threading.Event()
        future.add_done_callback(lambda _: 1 / 0)
        future.add_done_callback(lambda _: heard.set())
        journal.finish()
        assert heard.wait(5)
        assert future.result(5).seq == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_callback_hears_of_what_cannot_be_known() -> None:
    pending = {"future_id": "fut_1", "run_id": RUN_ID, "kind": "optim_step", "seq": 1}
    wire = Wire(reply({**pending, "status": "pending"}), refusal(401, "unauthorized"))
    with wire.client() as client:
        future = client.future("fut_1")
        heard = threading.Event()
        future.add_done_callback(lambda _: heard.set())
        assert heard.wait(5)
        with pytest.raises(rs.AuthenticationError):
            future.result(5)


def test_a_callback_of_a_closed_client_is_called(journal: Journal) -> None:
    client = journal.client()
    future = client.run(RUN_ID).optim_step_async()
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    client.close()
    assert heard == [future]
    future.add_done_callback(heard.append)
    assert heard == [future, future]
    with pytest.raises(rs.SignalConnectionError, match="closed"):
        future.result()
