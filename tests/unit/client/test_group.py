"""Several futures: all, any, one after the other; of threads and of event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from tests.unit.client.test_async import RUN_ID, in_loop, nobody_waits
from tests.unit.client.wire import Journal


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def client(journal: Journal) -> Iterator[rs.SignalClient]:
    with journal.client() as found:
        yield found


def futures_of(client: rs.SignalClient, count: int) -> list[rs.APIFuture[Any]]:
    return client.run(RUN_ID).submit({"kind": "optim_step"} for _ in range(count))


def test_a_group_is_waited_for(journal: Journal, client: rs.SignalClient) -> None:
    group = rs.FutureGroup(futures_of(client, 2))
    assert group.add(client.run(RUN_ID).optim_step_async()) in list(group)
    assert (len(group), group.done()) == (3, False)
    threading.Timer(0.05, journal.finish, [3]).start()
    assert [result.seq for result in group.wait_all(5)] == [1, 2, 3]
    assert group.done()
    assert repr(group) == "<FutureGroup of 3, 3 known to have ended>"
    assert rs.FutureGroup().wait_all() == []


def test_wait_any_returns_what_has_ended(journal: Journal, client: rs.SignalClient) -> None:
    group = rs.FutureGroup(futures_of(client, 5))
    with pytest.raises(rs.SignalTimeoutError, match="5 futures"):
        group.wait_any(0.05)
    journal.finish(2)
    ended = group.wait_any(5)
    assert {future.seq for future in ended} <= {1, 2}
    assert ended
    assert nobody_waits(client)
    assert rs.FutureGroup().wait_any(0.0) == []


def test_a_group_is_cancelled_from_its_end(journal: Journal, client: rs.SignalClient) -> None:
    group = rs.FutureGroup(futures_of(client, 4))
    journal.finish()
    assert group.cancel() == 3
    assert group.cancel() == 0
    with pytest.raises(rs.OperationCancelledError):
        group.wait_all(5)


def test_as_completed_gives_the_first_first(journal: Journal, client: rs.SignalClient) -> None:
    futures = futures_of(client, 6)
    seen = []
    journal.finish()
    for future in rs.as_completed(futures, timeout=5):
        seen.append(future.seq)
        # The next one ends once this one has been given.
        journal.finish()
    assert seen == [1, 2, 3, 4, 5, 6]
    assert nobody_waits(client)


def test_as_completed_runs_out_of_time(journal: Journal, client: rs.SignalClient) -> None:
    futures = futures_of(client, 3)
    journal.finish()
    completed = rs.as_completed(futures, timeout=0.2)
    assert next(completed).seq == 1
    began = time.monotonic()
    with pytest.raises(rs.SignalTimeoutError, match="2 futures"):
        next(completed)
    assert time.monotonic() - began < 2
    assert nobody_waits(client)


def test_as_completed_that_is_left_early_watches_no_more(
    journal: Journal, client: rs.SignalClient
) -> None:
    futures = futures_of(client, 3)
    journal.finish()
    for _ in rs.as_completed(futures):
        break
    assert nobody_waits(client)


def test_failed_futures_are_completed_ones(journal: Journal, client: rs.SignalClient) -> None:
    futures = futures_of(client, 2)
    journal.finish(code="no_gradients", message="None there.")
    journal.finish()
    errors = [future.exception() for future in rs.as_completed(futures, 5)]
    assert sum(error is None for error in errors) == 1


def test_a_closed_client_ends_the_iteration(journal: Journal, client: rs.SignalClient) -> None:
    completed = rs.as_completed(futures_of(client, 2))
    threading.Timer(0.05, client.close).start()
    with pytest.raises(rs.SignalConnectionError, match="closed"):
        next(completed)


def test_held_back_futures_are_sent_by_those_who_wait(
    journal: Journal, client: rs.SignalClient
) -> None:
    with client.run(RUN_ID).pipeline() as pipe:
        futures = [pipe.optim_step() for _ in range(3)]
        threading.Timer(0.05, journal.finish, [3]).start()
        assert [one.seq for one in rs.as_completed(futures, 5)] == [1, 2, 3]


def test_futures_of_several_clients(journal: Journal, client: rs.SignalClient) -> None:
    other = Journal()
    with other.client() as second:
        futures = futures_of(client, 2) + futures_of(second, 2)
        threading.Timer(0.05, journal.finish, [2]).start()
        threading.Timer(0.1, other.finish, [2]).start()
        assert [one.seq for one in rs.wait_all(futures, 5)] == [1, 2, 1, 2]


# In an event loop.


def test_groups_are_awaited(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            group: rs.FutureGroup[Any] = rs.FutureGroup()
            for future in await run.submit([{"kind": "optim_step"}] * 3):
                group.add(future)
            threading.Timer(0.05, journal.finish).start()
            assert [one.seq for one in await group.wait_any(5)] == [1]
            journal.finish(2)
            waited = group.wait_all(5)
            results = await waited
            assert [one.seq for one in results] == [1, 2, 3]
            assert await waited == results == waited

    in_loop(work())


def test_awaited_groups_run_out_of_time_and_raise(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            group = rs.FutureGroup(await run.submit([{"kind": "optim_step"}] * 3))
            for wait in (group.wait_all, group.wait_any):
                with pytest.raises(rs.SignalTimeoutError, match="3 futures"):
                    await wait(0.05)
            assert nobody_waits(client._client)
            journal.finish(3, code="no_gradients", message="None there.")
            with pytest.raises(rs.OperationConflictError, match="None there"):
                await group.wait_all(5)

    in_loop(work())


def test_as_completed_in_a_loop(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            group = rs.FutureGroup(await run.submit([{"kind": "optim_step"}] * 3))
            seen = []
            journal.finish()
            async for future in group.as_completed(5):
                seen.append(future.seq)
                journal.finish()
            assert seen == [1, 2, 3]
            late = rs.FutureGroup(await run.submit([{"kind": "optim_step"}] * 2))
            with pytest.raises(rs.SignalTimeoutError, match="2 futures"):
                async for _ in late.as_completed(0.05):
                    pass
            assert nobody_waits(client._client)

    in_loop(work())


def test_a_synchronous_clients_group_in_a_loop(journal: Journal) -> None:
    """It blocks, as its futures do, and may be awaited all the same."""

    async def work() -> None:
        with journal.client() as client:
            group = rs.FutureGroup(futures_of(client, 2))
            journal.finish(2)
            assert [one.seq for one in await group.wait_all(5)] == [1, 2]

    in_loop(work())


def test_the_loop_goes_on_while_a_group_is_awaited(journal: Journal) -> None:
    async def work() -> None:
        async with journal.async_client() as client:
            run = await client.run(RUN_ID)
            group = rs.FutureGroup(await run.submit([{"kind": "optim_step"}] * 2))
            ticks = 0
            waiting = asyncio.ensure_future(_all(group))
            while ticks < 5:
                await asyncio.sleep(0.01)
                ticks += 1
            journal.finish(2)
            assert len(await waiting) == 2

    in_loop(work())


async def _all(group: rs.FutureGroup[Any]) -> list[Any]:
    return await group.wait_all(5)
