"""Many samples waited for in one request: each is told of once, and again when an answer was lost.

As on a server with accelerators, where the SDK is told to wait in that way.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tinker

from tests.contract.tinker.support import MODEL, PROMPT, key_of, params
from tests.contract.tinker.wire import LONG, Wire
from tests.support import stack as stacks
from tests.support.stack import RunningStack
from workers.settings import Settings

COPY = 1_000_000_000
# More than a process has connections to Redis by its library's default.
MANY = 300
# And more than it may have files open by the usual limit.
POLLS = 1200


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningStack]:
    """A stack of its own, whose clients wait in one request."""
    data_dir = tmp_path_factory.mktemp("polling") / "data"
    options = ("--model", f"{MODEL}={tiny_model}", "--devices", "cpu:2x1")
    settings = {"SIGNAL_SAMPLE_POLLS": "together", "SIGNAL_MAX_WAITS": str(POLLS + 100)}
    yield stacks.up(data_dir, *options, env=settings)
    stacks.down(data_dir)


@pytest.fixture
def wire(stack: RunningStack) -> Iterator[Wire]:
    made = Wire(stack)
    yield made
    made.close()


@pytest.fixture
def sampler(wire: Wire) -> str:
    return wire.sampler()


def polled(wire: Wire, sampler: str, cursor: int = 0, copy: int = 0, **more: Any) -> Any:
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler,
        "cloned_sampler_id": copy,
    }
    return wire.ok("retrieve_futures", target=target, prev_cursor=cursor, **more)


def all_of(
    wire: Wire, sampler: str, count: int, cursor: int = 0, copy: int = 0
) -> tuple[dict[str, str], int]:
    """State by request id, of the next `count` that end, and the cursor behind them."""
    found: dict[str, str] = {}
    while len(found) < count:
        answer = polled(wire, sampler, cursor, copy)
        cursor = answer["cursor"]
        fresh = {one["request_id"]: one["state"] for one in answer["completions"]}
        assert not fresh.keys() & found.keys()
        found |= fresh
    return found, cursor


def test_the_sdk_waits_for_all_samples_together(service: Any, model: Any) -> None:
    sampler = model.save_weights_and_get_sampling_client().result()
    begun = time.monotonic()
    futures = [sampler.sample(PROMPT, 1, params(seed=seed)) for seed in range(MANY)]
    found = [tuple(future.result(timeout=60).sequences[0].tokens) for future in futures]
    assert sampler._futures_poller is not None
    # No poll was taken for one that meets an outage: those are held for longer.
    assert time.monotonic() - begun < Settings.outage_hold_s
    # Each future has its own result: the same that it has alone.
    assert len(set(found)) > MANY // 2
    for seed in (0, MANY - 1):
        alone = sampler.sample(PROMPT, 1, params(seed=seed)).result(timeout=60).sequences[0].tokens
        assert tuple(alone) == found[seed]


def test_copies_of_a_client_are_told_of_their_own(stack: RunningStack, model: Any) -> None:
    first = model.save_weights_and_get_sampling_client().result()
    handle, key = first.get_sampler_handle(), key_of(stack.api_key)
    copies = [tinker.SamplingClient.from_sampler_handle(handle, api_key=key) for _ in range(2)]
    futures = [
        [one.sample(PROMPT, 1, params(seed=seed)) for seed in range(8)] for one in (first, *copies)
    ]
    rows = [[tuple(f.result(timeout=60).sequences[0].tokens) for f in row] for row in futures]
    assert rows[0] == rows[1] == rows[2]
    assert len({one._cloned_sampler_id for one in (first, *copies)}) == 3
    for one in copies:
        # Else it says for as long as the tests last that the server is gone.
        one.holder.close()


def test_each_is_told_of_once_and_again_when_the_answer_was_lost(wire: Wire, sampler: str) -> None:
    ids = {wire.sample(sampler, seq) for seq in range(5)}
    found, cursor = all_of(wire, sampler, 5)
    assert found == dict.fromkeys(ids, "finished")
    # As if every answer had been lost: all once more. What the client has seen is forgotten.
    again = polled(wire, sampler, 0, timeout=0)
    assert {one["request_id"] for one in again["completions"]} <= ids
    assert again["cursor"] == cursor
    assert polled(wire, sampler, cursor, timeout=0) == {"completions": [], "cursor": cursor}
    later = wire.sample(sampler, 5)
    assert all_of(wire, sampler, 1, cursor)[0] == {later: "finished"}
    # Results are kept, whatever was said of them.
    polled(wire, sampler, cursor, timeout=0, retrieved_request_ids=sorted(ids))
    for one in ids:
        assert wire.result({"request_id": one}).headers["Content-Type"].endswith("protobuf")


def test_a_poll_hears_of_what_is_sent_while_it_is_held(
    stack: RunningStack, wire: Wire, sampler: str
) -> None:
    long = wire.sample(sampler, 0, 64, **LONG)
    with ThreadPoolExecutor(1) as pool:
        other = Wire(stack)
        held = pool.submit(polled, other, sampler)
        time.sleep(0.5)
        assert not held.done()
        short = wire.sample(sampler, 1)
        (one,) = held.result()["completions"]
        other.close()
    assert (one["state"], one["request_id"]) == ("finished", short)
    wire.ok("cancel_future", request_id=long)


def test_polls_by_the_thousand_are_held_and_answered_together(
    stack: RunningStack, wire: Wire, sampler: str
) -> None:
    """Each of them reads its result in Redis at the same moment."""
    long = wire.sample(sampler, 0, 64, **LONG)
    where = httpx2.URL(stack.base_url)
    request = (
        "POST /api/v1/retrieve_future HTTP/1.1\r\nHost: signal\r\nContent-Type: application/json\r\n"
        f"X-API-Key: {key_of(stack.api_key)}\r\nContent-Length: {{}}\r\n\r\n{{}}"
    )
    body = json.dumps({"request_id": long})
    with ExitStack() as stack_of_sockets:
        polls = []
        for _ in range(POLLS):
            poll = socket.create_connection((where.host, where.port), timeout=30)
            polls.append(stack_of_sockets.enter_context(poll))
            poll.sendall(request.format(len(body), body).encode())
        begun = time.monotonic()
        # The others are served meanwhile.
        wire.ok("client/config")
        assert time.monotonic() - begun < 5
        wire.ok("cancel_future", request_id=long)
        answers = [poll.recv(65536) for poll in polls]
    refused = [answer for answer in answers if not answer.startswith(b"HTTP/1.1 200")]
    assert not refused, (len(refused), refused[0])


def test_what_is_cancelled_ends_as_failed(wire: Wire, sampler: str) -> None:
    long = wire.sample(sampler, 0, 64, **LONG)
    begun = time.monotonic()
    held = polled(wire, sampler, timeout=0.5)
    assert held["completions"] == [] and time.monotonic() - begun > 0.4
    wire.ok("cancel_future", request_id=long)
    found, _ = all_of(wire, sampler, 1, held["cursor"])
    assert found == {long: "failed"}
    assert wire.result({"request_id": long}).json()["code"] == "cancelled"


def test_copies_are_told_apart_by_the_numbers_of_their_requests(wire: Wire, sampler: str) -> None:
    first, second = wire.sample(sampler, 0), wire.sample(sampler, 3 * COPY)
    for copy, expected in ((0, first), (3, second)):
        assert all_of(wire, sampler, 1, copy=copy)[0] == {expected: "finished"}


def stable(answer: httpx2.Response, status: int) -> None:
    assert answer.status_code == status and answer.json()["detail"], answer.text


def test_wrong_polls_are_refused(stack: RunningStack, wire: Wire, sampler: str) -> None:
    def post(**changes: Any) -> httpx2.Response:
        target = {"sampling_session_id": sampler, "cloned_sampler_id": 0}
        return wire.post("retrieve_futures", **{"target": target, "prev_cursor": 0, **changes})

    # What the server knows nothing of must not be waited for.
    stable(post(), 410)
    wire.sample(sampler, 0)
    stable(post(prev_cursor=99), 410)
    stable(post(prev_cursor=-1), 422)
    stable(post(timeout=-1), 422)
    stable(post(target={}), 422)
    stable(post(target={"type": "model", "sampling_session_id": sampler}), 422)
    stable(post(target={"sampling_session_id": "ses_0:sample:0"}), 404)
    other = Wire(stack, stack.new_user("polls"))
    target = {"sampling_session_id": sampler, "cloned_sampler_id": 0}
    stable(other.post("retrieve_futures", target=target, prev_cursor=0), 404)
    other.close()
