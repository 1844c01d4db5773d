"""Redis is away: a poll is held and then answered 429, never 5xx; when it is back the SDK goes on.

And polls that are more than a process holds are answered 429, those of retrieve_futures too.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.contract.tinker.support import MODEL, PROMPT, STEP, params, plain, service_of
from tests.contract.tinker.wire import LONG, Wire
from tests.support import stack as stacks
from tests.support.inside import Inside
from tests.support.stack import RunningStack
from workers.settings import Settings

# Longer than the calls to Redis take to give up.
HOLD_S, WAITS = 15.0, 30
ENVIRONMENT = {
    "SIGNAL_OUTAGE_HOLD": str(HOLD_S),
    "SIGNAL_MAX_WAITS": str(WAITS),
    "SIGNAL_WEB_WORKERS": "1",
}
STEPS = 8


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningStack]:
    """A stack of its own, with a short hold and few places for polls."""
    data_dir = tmp_path_factory.mktemp("outage") / "data"
    options = ("--model", f"{MODEL}={tiny_model}", "--devices", "cpu:1x1")
    yield stacks.up(data_dir, *options, env=ENVIRONMENT)
    stacks.down(data_dir)


@contextmanager
def silent(stack: RunningStack) -> Iterator[None]:
    """Redis stands still: connections stay open and nothing answers."""
    with Inside(stack) as inside:
        redis = inside.service("redis")
    redis.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        redis.signal(signal.SIGCONT)


def test_a_poll_is_held_and_answered_429(stack: RunningStack) -> None:
    assert Settings.outage_hold_s == 20.0
    wire = Wire(stack)
    model = wire.model()
    first = wire.loss(model, 1)
    wire.result(first)
    request_id = first.json()["request_id"]
    with silent(stack), ThreadPoolExecutor(4) as pool:
        begun = time.monotonic()
        polls = [pool.submit(wire.post, "retrieve_future", request_id=request_id) for _ in range(4)]
        answers = [poll.result() for poll in polls]
        seconds = time.monotonic() - begun
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.json()["code"] for answer in answers} == {"unavailable"}
    assert HOLD_S <= seconds < HOLD_S + 10
    assert wire.number(first) > 0
    wire.close()


def test_polls_for_many_samples_are_bounded_as_others_are(stack: RunningStack) -> None:
    wire = Wire(stack)
    sampler = wire.sampler()
    long = wire.sample(sampler, 0, 64, **LONG)
    target = {"sampling_session_id": sampler, "cloned_sampler_id": 0}
    many = WAITS + 8
    with ThreadPoolExecutor(many) as pool:

        def poll(_: int) -> httpx2.Response:
            return wire.post("retrieve_futures", target=target, prev_cursor=0, timeout=4)

        answers = list(pool.map(poll, range(many)))
    wire.ok("cancel_future", request_id=long)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(refused) == many - WAITS
    assert {answer.json()["code"] for answer in refused} == {"too_many_waits"}
    wire.close()


def test_no_more_samples_are_under_way_than_can_be_waited_for(stack: RunningStack) -> None:
    """The others stay with the client, and none meets a poll that is refused."""
    service = service_of(stack)
    sampler = service.create_sampling_client(base_model=MODEL)
    assert sampler._get_futures_poller() is None
    begun = time.monotonic()
    futures = [sampler.sample(PROMPT, 1, params(seed=seed)) for seed in range(2 * WAITS)]
    found = [tuple(future.result(timeout=60).sequences[0].tokens) for future in futures]
    # A refused poll is repeated after a second at least, then two, then four.
    assert time.monotonic() - begun < HOLD_S
    assert len(set(found)) > WAITS
    for seed in (0, 2 * WAITS - 1):
        alone = sampler.sample(PROMPT, 1, params(seed=seed)).result(timeout=60).sequences[0].tokens
        assert tuple(alone) == found[seed]
    service.close("success").result()


def trained(model: Any, during: Any = None) -> list[float]:
    """The losses of a loop; `during()` is called in its middle."""
    losses = []
    for number in range(STEPS):
        losses.append(model.forward_backward([plain()], "cross_entropy"))
        model.optim_step(STEP)
        if during is not None and number == STEPS // 2:
            during()
    return [future.result(timeout=90).metrics["loss:sum"] for future in losses]


def test_the_sdk_goes_on_when_redis_is_back(stack: RunningStack) -> None:
    service = service_of(stack)
    quiet, other = (
        service.create_lora_training_client(base_model=MODEL, rank=4, seed=3).result()
        for _ in range(2)
    )
    expected = trained(quiet)
    sampler = quiet.save_weights_and_get_sampling_client().result()
    before = sampler.sample(PROMPT, 1, params()).result().sequences[0].tokens
    pending: list[Any] = []

    def away() -> None:
        with silent(stack):
            pending.append(sampler.sample(PROMPT, 1, params()))
            time.sleep(8)

    assert trained(other, away) == expected
    assert list(pending[0].result(timeout=90).sequences[0].tokens) == list(before)
    service.close("success").result()
