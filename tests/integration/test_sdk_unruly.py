"""Training through a network that loses, delays, doubles and tears, and over restarts of the web server.

The numbers and the certificate are those of the undisturbed run, bit for bit: no operation was lost, none
was done twice, none changed its place.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import rewardsignal as rs
from tests.chaos.course import CONFIG, course, difference
from tests.chaos.loop import PATIENCE_S, WINDOW, Loop, paced
from tests.support.inside import Inside
from tests.support.proxy import UnrulyProxy
from tests.support.stack import RunningStack

COURSE = course(20, large=False)


@dataclass(frozen=True)
class Reference:
    """The course undisturbed."""

    results: list[dict[str, Any]]
    sha256: str


@pytest.fixture(scope="module")
def reference(stack: RunningStack) -> Reference:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run(**CONFIG)
        found = Reference(Loop(run, COURSE).start().join(), run.certificate().sha256)
        run.cancel()
        return found


@pytest.fixture
def inside(stack: RunningStack) -> Iterator[Inside]:
    with Inside(stack) as found:
        yield found


async def trained(run: rs.AsyncSignalRun) -> list[dict[str, Any]]:
    """The course, a window of operations under way, the places taken in the order of the calls."""
    results: list[dict[str, Any]] = []
    for begin in range(0, len(COURSE), WINDOW):
        futures = await run.submit(COURSE[begin : begin + WINDOW])
        async for _ in rs.FutureGroup(futures).as_completed(PATIENCE_S):
            pass
        for future in futures:
            error = future.exception()
            results.append({"error": error.code} if error else future.result().to_dict())
    return results


def equal(results: list[dict[str, Any]], certificate: rs.Record, expected: Reference) -> None:
    assert difference(results, expected.results) is None
    assert certificate["sha256"] == expected.sha256


@pytest.mark.parametrize("seed", [1, 2])
def test_a_loop_through_an_unruly_network(
    stack: RunningStack, reference: Reference, seed: int
) -> None:
    with (
        UnrulyProxy(stack.base_url, seed, rate=0.6) as proxy,
        rs.SignalClient(stack.api_key, proxy.base_url) as client,
    ):
        run = client.create_run(**CONFIG)
        results = Loop(run, COURSE).start().join()
        assert run.status().next_seq == len(COURSE) + 1
        equal(results, run.certificate(), reference)
        run.cancel()
    assert len(proxy.met) > 4


@pytest.mark.parametrize("seed", [3, 4])
def test_an_event_loop_through_an_unruly_network(
    stack: RunningStack, reference: Reference, seed: int
) -> None:
    async def work(base_url: str) -> None:
        async with rs.AsyncSignalClient(stack.api_key, base_url) as client:
            run = await client.create_run(**CONFIG)
            results = await trained(run)
            assert (await run.status()).next_seq == len(COURSE) + 1
            equal(results, await run.certificate(), reference)
            await run.cancel()

    with UnrulyProxy(stack.base_url, seed, rate=0.6) as proxy:
        asyncio.run(work(proxy.base_url))
    assert len(proxy.met) > 4


def test_samples_and_streams_through_an_unruly_network(stack: RunningStack) -> None:
    prompts: list[str] = [f"{index}:" for index in range(12)]
    options: Any = {"max_tokens": 6, "stop": [], "weights": "base", "seed": 3}
    with (
        UnrulyProxy(stack.base_url, 5, rate=0.6) as proxy,
        rs.SignalClient(stack.api_key, proxy.base_url) as client,
        rs.SignalClient(stack.api_key, stack.base_url) as undisturbed,
    ):
        run = client.create_run(**CONFIG)
        same = undisturbed.run(run.run_id)
        expected = [same.sample(prompt, **options).texts for prompt in prompts]
        # A stream that breaks has fewer tokens; its result is whole all the same.
        assert [run.stream_sample(one, **options).result(60).texts for one in prompts] == expected
        futures = [run.sample_async(prompt, **options) for prompt in prompts]
        assert [one.texts for one in rs.wait_all(futures, 60)] == expected
        run.cancel()


def killed_web(inside: Inside) -> None:
    """SIGKILL to gunicorn's master; returns once another one is there."""
    web = inside.service("web")
    web.signal(signal.SIGKILL)
    inside.await_restart(web, "web", 60)


@pytest.mark.timeout(240)
def test_a_loop_over_restarts_of_the_web_server(
    stack: RunningStack, reference: Reference, inside: Inside
) -> None:
    def before(index: int) -> None:
        if index in (10, 30):
            killed_web(inside)

    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run(**CONFIG)
        results = Loop(run, paced(COURSE, before)).start().join(200)
        equal(results, run.certificate(), reference)
        run.cancel()


@pytest.mark.timeout(240)
def test_an_event_loop_over_a_restart_of_the_web_server(
    stack: RunningStack, reference: Reference, inside: Inside
) -> None:
    async def work() -> None:
        async with rs.AsyncSignalClient(stack.api_key, stack.base_url) as client:
            run = await client.create_run(**CONFIG)
            # While the first operations are under way.
            threading.Timer(0.3, killed_web, [inside]).start()
            equal(await trained(run), await run.certificate(), reference)
            await run.cancel()

    asyncio.run(work())
