"""Both clients over the Flask application in this process: no socket between them, the stack behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing

import httpx2
import pytest

import rewardsignal as rs
from tests.support.inside import Inside
from tests.support.stack import RunningStack
from web import create_app
from workers.settings import Settings

BATCH = [{"text": "The quick brown fox."}]


@pytest.fixture(scope="module")
def transport(stack: RunningStack) -> Iterator[httpx2.WSGITransport]:
    """The application over the stack's Redis and SQL; its workers do the work."""
    with Inside(stack) as inside:
        app = create_app(Settings.from_env(inside.environment))
    with closing(app.extensions["signal"]):
        yield httpx2.WSGITransport(app)


def test_the_synchronous_client(stack: RunningStack, transport: httpx2.WSGITransport) -> None:
    with rs.SignalClient(stack.api_key, "http://in.process", transport=transport) as client:
        with client.create_run("tiny", lora_r=4) as run:
            future = run.forward_backward_async(BATCH)
            assert run.optim_step(1e-3).step == 1
            assert future.result(30).seq == 1
            with pytest.raises(rs.ValidationError) as caught:
                run.sample("a", max_tokens=-1)
            assert caught.value.param == "max_tokens"
        assert run.status().status == "completed"


def test_the_asynchronous_client(stack: RunningStack, transport: httpx2.WSGITransport) -> None:
    async def loop() -> list[int]:
        async with (
            rs.AsyncSignalClient(stack.api_key, "http://in.process", transport=transport) as client,
            await client.create_run("tiny", lora_r=4) as run,
        ):
            futures = await asyncio.gather(*(run.forward_backward_async(BATCH) for _ in range(4)))
            step = await run.optim_step_async(1e-3)
            return [result.seq for result in await asyncio.gather(*futures)] + [(await step).seq]

    assert asyncio.run(loop()) == [1, 2, 3, 4, 5]
