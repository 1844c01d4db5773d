"""The asynchronous client against a real stack: thousands in flight, loops, groups, streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest

import rewardsignal as rs
from tests.support.connections import MostConnections
from tests.support.inside import until
from tests.support.stack import RunningStack

ROW: list[dict[str, Any]] = [{"tokens": list(range(5, 13))}]
IN_FLIGHT = 2000
V = TypeVar("V")


def in_loop(work: Coroutine[Any, Any, V]) -> V:
    """`work` in a loop of its own."""
    return asyncio.run(work)


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.api_key, stack.base_url) as found:
        yield found


@pytest.fixture
def run(client: rs.SignalClient) -> Iterator[rs.SignalRun]:
    found = client.create_run("tiny", lora_r=4, learning_rate=1e-3, seed=1)
    yield found
    found.cancel()


def test_the_whole_loop(stack: RunningStack) -> None:
    async def work() -> None:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            async with await client.create_run("tiny", lora_r=4, learning_rate=1e-2) as run:
                losses = []
                for _ in range(5):
                    forward, step = await asyncio.gather(
                        run.forward_backward_async(ROW), run.optim_step_async()
                    )
                    losses.append((await forward).loss)
                    assert (await step)["step"] == len(losses)
                assert losses[-1] < losses[0]
                assert len((await run.sample("a", max_tokens=3)).texts) == 1
                saved = await run.save_state("mine")
            assert (await run.status()).status == "completed"
            assert saved.name == "mine"
            assert run.run_id in [one.run_id async for one in client.list_runs()]
            assert (await client.run(run.run_id)).info.next_seq == 14

    in_loop(work())


@pytest.mark.timeout(240)
def test_thousands_in_flight_of_one_loop_cost_few_connections(
    stack: RunningStack, run: rs.SignalRun
) -> None:
    async def work() -> list[int]:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            same = await client.run(run.run_id)
            calls = [same.sample_async("a", max_tokens=1) for _ in range(IN_FLIGHT)]
            futures = await asyncio.gather(*calls)
            results = await asyncio.gather(*futures)
            return [result["seq"] for result in results]

    with MostConnections(stack.base_url) as connections:
        seqs = in_loop(work())
    assert seqs == list(range(1, IN_FLIGHT + 1))
    assert run.status().next_seq == IN_FLIGHT + 1
    assert 1 <= connections.most <= 10


@pytest.mark.timeout(240)
def test_thousands_in_flight_of_threads_cost_few_connections(
    stack: RunningStack, run: rs.SignalRun
) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        same = client.run(run.run_id)
        futures = same.submit(
            {"kind": "sample", "prompts": ["a"], "max_tokens": 1} for _ in range(IN_FLIGHT)
        )
        seqs: list[int] = []
        threads = [
            threading.Thread(target=lambda one=future: seqs.append(one.result(200).seq))
            for future in futures
        ]
        with MostConnections(stack.base_url) as connections:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(200)
    assert sorted(seqs) == list(range(1, IN_FLIGHT + 1))
    assert 1 <= connections.most <= 10


def test_samples_without_a_place_are_awaited_together(
    stack: RunningStack, run: rs.SignalRun
) -> None:
    async def work() -> None:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            same = await client.run(run.run_id)
            group: rs.FutureGroup[rs.Record] = rs.FutureGroup(
                await asyncio.gather(
                    *(
                        same.sample_async("a", max_tokens=2, weights="base", seed=seed)
                        for seed in range(200)
                    )
                )
            )
            assert await group.wait_any(60)
            seen = [future async for future in group.as_completed(60)]
            assert len(seen) == 200
            assert len(await group.wait_all(60)) == 200

    with MostConnections(stack.base_url) as connections:
        in_loop(work())
    assert connections.most <= 12


def test_waits_of_several_loops_and_a_thread(client: rs.SignalClient, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(ROW)

    async def wait() -> float:
        return (await future).loss

    losses = [in_loop(wait()), in_loop(wait()), future.result(60).loss]
    assert len(set(losses)) == 1
    heard = threading.Event()
    step = run.optim_step_async()
    step.add_done_callback(lambda _: heard.set())
    assert heard.wait(60)
    assert step.settled


def test_an_await_that_ran_out_of_time_is_repeated(stack: RunningStack, run: rs.SignalRun) -> None:
    async def work() -> None:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            same = await client.run(run.run_id)
            future = await same.sample_async("a", max_tokens=400, stop=[])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_awaited(future), 0.01)
            assert len((await future).samples[0][0].token_ids) == 400

    in_loop(work())


async def _awaited(future: rs.APIFuture[Any]) -> Any:
    return await future


# Streams.


def test_a_stream_gives_the_tokens_of_the_sample(run: rs.SignalRun) -> None:
    with run.stream_sample(["Once", "a"], max_tokens=12, n=2, seed=5, stop=[]) as stream:
        tokens = list(stream)
        result = stream.result()
    assert not any(token.restart for token in tokens)
    for prompt, samples in enumerate(result.samples):
        for copy, sample in enumerate(samples):
            own = [one for one in tokens if (one.prompt, one.sample) == (prompt, copy)]
            assert [one.token_id for one in own] == sample.token_ids
            # The last bytes of a character that the sample does not end are no text of a token.
            assert sample.text.startswith("".join(one.text for one in own).rstrip("\ufffd"))
    again = run.sample(["Once", "a"], max_tokens=12, n=2, seed=5, stop=[])
    assert again.texts == result.texts
    pieces = list(run.inference("base").stream_sample("Once", max_tokens=8, temperature=0.0))
    assert (
        run.sample("Once", max_tokens=8, temperature=0.0, weights="base")
        .texts[0]
        .startswith("".join(pieces).rstrip("\ufffd"))
    )


def test_a_stream_in_a_loop(stack: RunningStack, run: rs.SignalRun) -> None:
    async def work() -> list[int | None]:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            same = await client.run(run.run_id)
            stream = same.stream_sample("Once", max_tokens=12, seed=5, stop=[])
            return [token.token_id async for token in stream]

    expected = run.sample("Once", max_tokens=12, seed=5, stop=[]).samples[0][0].token_ids
    assert in_loop(work()) == expected


def test_leaving_a_stream_cancels_the_sample(run: rs.SignalRun) -> None:
    with run.stream_sample("Once", max_tokens=2000, stop=[]) as stream:
        assert next(iter(stream)).token_id is not None
    with pytest.raises(rs.OperationCancelledError):
        stream.future.result(30)


def test_leaving_a_stream_in_a_loop_cancels_the_sample(
    stack: RunningStack, run: rs.SignalRun
) -> None:
    first = run.status().next_seq

    async def work() -> None:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            same = await client.run(run.run_id)
            stream = same.stream_sample("Once", max_tokens=2000, stop=[])
            assert (await anext(stream)).token_id is not None
            await stream.aclose()
            await _finished(same, first, "cancelled")
            # Given up by a task that is cancelled while it waits for its first token: it is queued.
            blocker = await same.sample_async("Once", max_tokens=1500, stop=[])
            queued = asyncio.ensure_future(_tokens(same))
            while (await same.status()).next_seq < first + 3:
                await asyncio.sleep(0.02)
            queued.cancel()
            with pytest.raises(asyncio.CancelledError):
                await queued
            await blocker
            await _finished(same, first + 2, "cancelled")

    in_loop(work())


async def _tokens(run: rs.AsyncSignalRun) -> list[Any]:
    return [token async for token in run.stream_sample("Once", max_tokens=1999, stop=[])]


async def _finished(run: rs.AsyncSignalRun, seq: int, status: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        page = await run.operations(after_seq=seq - 1, wait=5)
        if page.data:
            assert (page.data[0].seq, page.data[0].status) == (seq, status)
            return
    raise AssertionError(f"{seq} does not end")


def test_closing_a_stream_from_another_thread_ends_it(run: rs.SignalRun) -> None:
    stream = run.stream_sample("Once", max_tokens=2000, stop=[])
    tokens: list[Any] = []
    reader = threading.Thread(target=lambda: tokens.extend(stream))
    reader.start()
    time.sleep(0.2)
    stream.hang_up()
    reader.join(10)
    assert not reader.is_alive()
    with pytest.raises(rs.OperationCancelledError):
        stream.result(30)


def test_closing_the_client_ends_what_waits(stack: RunningStack, run: rs.SignalRun) -> None:
    client = rs.SignalClient(stack.api_key, stack.base_url)
    future = client.run(run.run_id).sample_async("a", max_tokens=1500, stop=[])
    errors: list[Any] = []

    def wait() -> None:
        try:
            future.result(60)
        except rs.SignalConnectionError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    client.close()
    waiting.join(10)
    assert len(errors) == 1
    until(lambda: run._transport.get(f"/futures/{future._id}").body["status"] == "completed")
