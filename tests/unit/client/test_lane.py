"""The lane: the order of the calls, what goes together, who is refused, who is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _lane
from tests.unit.client.test_async import BATCH, RUN_ID, in_loop
from tests.unit.client.wire import Journal, refusal


@pytest.fixture
def journal() -> Journal:
    return Journal()


def with_run(journal: Journal, work: Callable[[rs.AsyncSignalRun], Awaitable[None]]) -> None:
    """Drives `work` with a run of the journal."""

    async def whole() -> None:
        async with journal.async_client() as client:
            await work(await client.run(RUN_ID))

    in_loop(whole())


def refuses_text(text: str) -> Callable[[str, dict[str, Any]], httpx2.Response | None]:
    def judge(kind: str, body: dict[str, Any]) -> httpx2.Response | None:
        if any(example.get("text") == text for example in body.get("batch_data", ())):
            return refusal(422, "validation_error", param="batch_data.0.text")
        return None

    return judge


def test_calls_awaited_together_keep_their_order(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        futures = await asyncio.gather(*(run.optim_step_async() for _ in range(300)))
        assert [future.seq for future in futures] == list(range(1, 301))

    with_run(journal, work)


def test_all_objects_of_a_run_share_its_lane(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            first, second = await client.run(RUN_ID), await client.run(RUN_ID)
            calls = [
                call
                for _ in range(20)
                for call in (
                    first.forward_backward_async(BATCH),
                    second.optim_step_async(),
                    client.save_state_async(RUN_ID),
                )
            ]
            await asyncio.gather(*calls)
            kinds = [kind for kind, _ in journal.bodies]
            # Calls by id begin when the loop gets to them; each order is kept.
            placed = [kind for kind in kinds if kind != "save_state"]
            assert placed == ["forward_backward", "optim_step"] * 20
            assert first._lane is second._lane
            assert len(kinds) == 60

    in_loop(work())


def test_what_gathers_behind_a_request_goes_together(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.open.clear()
        first = run.optim_step_async()
        while not journal.keys:
            await asyncio.sleep(0.01)
        rest = [run.optim_step_async() for _ in range(2 * _lane.MOST)]
        journal.open.set()
        await asyncio.gather(first, *rest)
        assert len(journal.keys) == 3

    with_run(journal, work)


def test_a_wrong_operation_takes_no_neighbour_with_it(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.open.clear()
        journal.refuses = refuses_text("bad")
        texts = ["a", "b", "bad", "c", "bad", "d"]
        calls = [run.forward_backward_async([{"text": text}]) for text in texts]
        journal.open.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        refused = [isinstance(end, rs.ValidationError) for end in ends]
        assert refused == [text == "bad" for text in texts]
        assert [end.seq for end in ends if isinstance(end, rs.APIFuture)] == [1, 2, 3, 4]
        taken = [body["batch_data"][0]["text"] for _, body in journal.bodies]
        assert taken == ["a", "b", "c", "d"]

    with_run(journal, work)


def test_a_run_that_takes_nothing_refuses_all(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.refuses = lambda *_: refusal(409, "run_closed")
        calls = [run.optim_step_async() for _ in range(5)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, rs.ConflictError) for end in ends)
        assert len(journal.keys) <= 2

    with_run(journal, work)


def test_an_operation_is_taken_back_until_it_is_on_its_way(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.open.clear()
        under_way = asyncio.ensure_future(run.optim_step_async())
        while not journal.keys:
            await asyncio.sleep(0.01)
        queued = [asyncio.ensure_future(run.forward_backward_async(BATCH)) for _ in range(3)]
        await asyncio.sleep(0)
        for one in (under_way, queued[1]):
            one.cancel()
        await asyncio.sleep(0.01)
        journal.open.set()
        ends = await asyncio.gather(under_way, *queued, return_exceptions=True)
        assert [type(end) is asyncio.CancelledError for end in ends] == [True, False, True, False]
        assert [kind for kind, _ in journal.bodies] == ["optim_step", *["forward_backward"] * 2]

    with_run(journal, work)


def test_other_calls_wait_for_what_is_in_the_lane(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.open.clear()
        placed = [asyncio.ensure_future(run.optim_step_async()) for _ in range(3)]
        await asyncio.sleep(0)
        placed[-1].cancel()
        asked = asyncio.ensure_future(run.status())
        await asyncio.sleep(0.1)
        assert not asked.done()
        journal.open.set()
        assert (await asked).run_id == RUN_ID
        assert all(one.done() for one in placed)

    with_run(journal, work)


def test_a_client_that_closes_refuses_what_is_in_the_lane(journal: Journal) -> None:
    async def work() -> None:
        client = journal.async_client()
        run = await client.run(RUN_ID)
        journal.open.clear()
        under_way = asyncio.ensure_future(run.optim_step_async())
        while not journal.keys:
            await asyncio.sleep(0.01)
        queued = [asyncio.ensure_future(run.optim_step_async()) for _ in range(4)]
        await asyncio.sleep(0)
        await client.close()
        journal.open.set()
        ends = await asyncio.gather(under_way, *queued, return_exceptions=True)
        assert all(isinstance(one, rs.SignalConnectionError) for one in ends[1:])

    in_loop(work())


def test_a_pipeline_goes_through_the_lane(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        before = [asyncio.ensure_future(run.optim_step_async()) for _ in range(3)]
        await asyncio.sleep(0)
        async with run.pipeline(4) as pipe:
            futures = [pipe.forward_backward(BATCH) for _ in range(10)]
        assert [future.seq for future in futures] == list(range(4, 14))
        assert [(await one).seq for one in before] == [1, 2, 3]
        journal.finish(13)
        assert (await futures[-1]).seq == 13

    with_run(journal, work)


def test_a_full_pipeline_does_not_block_the_loop(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.open.clear()
        async with run.pipeline(2) as pipe:
            futures = [pipe.optim_step() for _ in range(5)]
            assert journal.futures == []
            waiting = asyncio.ensure_future(_seq(futures[0]))
            await asyncio.sleep(0.05)
            journal.open.set()
            while len(journal.futures) < 4:
                await asyncio.sleep(0.01)
            journal.finish()
            assert await waiting == 1
        assert [future.seq for future in futures] == [1, 2, 3, 4, 5]

    with_run(journal, work)


async def _seq(future: rs.APIFuture[Any]) -> int | None:
    return (await future).seq


def test_a_pipeline_raises_what_was_refused(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        journal.refuses = refuses_text("bad")
        futures = []
        with pytest.raises(rs.ValidationError):
            async with run.pipeline(2) as pipe:
                futures += [pipe.forward_backward([{"text": text}]) for text in ("a", "bad", "b")]
        for future in futures[:2]:
            with pytest.raises(rs.ValidationError):
                await future
        assert futures[2].seq == 1

    with_run(journal, work)


def test_a_pipeline_that_breaks_sends_nothing_more(journal: Journal) -> None:
    async def work(run: rs.AsyncSignalRun) -> None:
        futures = []

        async def breaks() -> None:
            async with run.pipeline() as pipe:
                futures.append(pipe.optim_step())
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            await breaks()
        assert journal.futures == []
        with pytest.raises(rs.ConflictError, match="before it was sent"):
            await futures[0]

    with_run(journal, work)
