"""Streams of tokens: events in, tokens out; breaks, errors, and leaving early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import rewardsignal as rs
from tests.unit.client.test_async import RUN_ID, in_loop
from tests.unit.client.wire import RUN, TIMINGS, Wire, refusal, reply, sent

FUTURE = {"future_id": "fut_1", "run_id": RUN_ID, "kind": "sample", "seq": 4, "status": "pending"}
RESULT = {"seq": 4, "samples": [[{"text": "ab", "token_ids": [1, 2]}]], "timings": TIMINGS}


def event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def token(index: int, text: str | None, **fields: Any) -> str:
    own = {"prompt": 0, "sample": 0, "token_id": index, "logprob": -0.5, "text": text}
    return event("token", {**own, **fields})


class Stream(httpx2.SyncByteStream):
    """A body in pieces, which says whether it was closed and can break in the middle."""

    def __init__(self, *pieces: str, breaks: bool = False) -> None:
        self.pieces, self.breaks, self.closed, self.given = pieces, breaks, False, 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.given += 1
            yield piece.encode()
        if self.breaks:
            raise httpx2.ReadError("broken")

    def close(self) -> None:
        self.closed = True


def answer(stream: Stream) -> httpx2.Response:
    headers = {"Content-Type": "text/event-stream", "X-Request-Id": "req_1"}
    return httpx2.Response(200, headers=headers, stream=stream)


def made(*answers: Any) -> tuple[Wire, rs.SignalRun]:
    wire = Wire(reply(RUN), *answers)
    run = wire.client().run(RUN_ID)
    wire.requests.clear()
    return wire, run


def test_tokens_and_then_the_result() -> None:
    body = Stream(
        event("future", FUTURE), token(1, "a"), token(2, None), token(3, "b", prompt=1, sample=2),
        event("result", RESULT),
    )  # fmt: skip
    wire, run = made(answer(body))
    with run.stream_sample("Once", max_tokens=3, seed=1) as stream:
        assert (stream.future.seq, stream.future.future_id) == (4, "fut_1")
        tokens = list(stream)
        assert [(one.token_id, one.text) for one in tokens] == [(1, "a"), (2, ""), (3, "b")]
        assert tokens[2] == rs.StreamToken(prompt=1, sample=2, token_id=3, logprob=-0.5, text="b")
        assert stream.result()[0] == "ab"
    assert body.closed
    request = wire.requests[0]
    assert request.url.path == f"/runs/{RUN_ID}/sample/stream"
    assert sent(request) == {"prompts": ["Once"], "max_tokens": 3, "seed": 1}
    assert request.headers["Accept"] == "text/event-stream"
    assert request.headers["Idempotency-Key"]


def test_events_come_in_any_pieces() -> None:
    text = event("future", FUTURE) + ": alive\n\n" + token(1, "é") + event("result", RESULT)
    _, run = made(answer(Stream(*text)))
    assert [one.text for one in run.stream_sample("Once")] == ["é"]


def test_a_restart_has_no_token() -> None:
    body = Stream(
        event("future", FUTURE), token(1, "a"), event("restart", {}), token(1, "a"),
        event("result", RESULT),
    )  # fmt: skip
    _, run = made(answer(body))
    tokens = list(run.stream_sample("Once"))
    assert [one.restart for one in tokens] == [False, True, False]
    assert tokens[1].token_id is None


def test_result_alone_reads_the_stream() -> None:
    _, run = made(answer(Stream(event("future", FUTURE), token(1, "a"), event("result", RESULT))))
    assert run.stream_sample("Once").result().texts == ["ab"]


def test_an_error_is_raised_where_it_comes() -> None:
    error = {"code": "worker_lost", "message": "Lost.", "retryable": False}
    body = Stream(event("future", FUTURE), token(1, "a"), event("error", {"error": error}))
    _, run = made(answer(body))
    stream = run.stream_sample("Once")
    assert next(iter(stream)).text == "a"
    body = Stream(event("future", FUTURE), event("error", {"error": error}))
    _, run = made(answer(body))
    with pytest.raises(rs.OperationFailedError, match="Lost") as caught:
        list(run.stream_sample("Once"))
    assert caught.value.request_id == "req_1"
    assert body.closed


def test_a_connection_that_breaks_is_no_end_of_the_sample() -> None:
    body = Stream(event("future", FUTURE), token(1, "a"), breaks=True)
    done = {**FUTURE, "status": "completed", "result": RESULT, "error": None}
    wire, run = made(answer(body), reply(done))
    stream = run.stream_sample("Once")
    assert [one.text for one in stream] == ["a"]
    assert stream.result(5).texts == ["ab"]
    assert wire.requests[1].url.path == "/futures/fut_1"


def test_leaving_hangs_up() -> None:
    body = Stream(event("future", FUTURE), token(1, "a"), token(2, "b"), event("result", RESULT))
    _, run = made(answer(body))
    for _ in run.stream_sample("Once"):
        break
    assert body.closed
    assert body.given == 2
    body = Stream(event("future", FUTURE), token(1, "a"))
    _, run = made(answer(body))
    with run.stream_sample("Once"):
        assert not body.closed
    assert body.closed


def test_what_the_server_refuses_is_raised_at_once() -> None:
    _, run = made(refusal(422, "validation_error", param="max_tokens"))
    with pytest.raises(rs.ValidationError, match="max_tokens"):
        run.stream_sample("Once", max_tokens=-1)


def test_a_busy_server_is_asked_again_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardsignal._transport.FIRST_PAUSE_S", 0.001)
    body = Stream(event("future", FUTURE), event("result", RESULT))
    wire, run = made(refusal(503, "overloaded", retryable=True), answer(body))
    assert run.stream_sample("Once").result().texts == ["ab"]
    assert len({request.headers["Idempotency-Key"] for request in wire.requests}) == 1


def test_a_stream_that_breaks_before_it_begins_is_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rewardsignal._transport.FIRST_PAUSE_S", 0.001)
    broken = Stream(breaks=True)
    body = Stream(event("future", FUTURE), token(1, "a"), event("result", RESULT))
    wire, run = made(answer(broken), answer(body))
    assert [one.text for one in run.stream_sample("Once")] == ["a"]
    assert broken.closed
    # Under a key of its own: what was hung up on is cancelled.
    assert len({request.headers["Idempotency-Key"] for request in wire.requests}) == 2


def test_a_stream_that_never_begins_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardsignal._transport.FIRST_PAUSE_S", 0.001)
    with Wire(reply(RUN), lambda _: answer(Stream())).client(retry_for=0.05) as client:
        run = client.run(RUN_ID)
        with pytest.raises(rs.SignalConnectionError, match="before it began"):
            run.stream_sample("Once")


def test_what_is_no_event_is_told() -> None:
    _, run = made(answer(Stream(event("future", FUTURE), "event: token\ndata: {oops\n\n")))
    with pytest.raises(rs.SignalAPIError, match="no JSON"):
        list(run.stream_sample("Once"))


# In an event loop.


def test_tokens_in_a_loop() -> None:
    body = Stream(event("future", FUTURE), token(1, "a"), token(2, "b"), event("result", RESULT))

    async def work() -> None:
        async with Wire(reply(RUN), answer(body)).async_client() as client:
            run = await client.run(RUN_ID)
            assert [one.text async for one in run.stream_sample("Once")] == ["a", "b"]

    in_loop(work())
    assert body.closed


def test_leaving_in_a_loop_hangs_up() -> None:
    body = Stream(event("future", FUTURE), token(1, "a"), token(2, "b"), event("result", RESULT))

    async def work() -> None:
        async with Wire(reply(RUN), answer(body)).async_client() as client:
            stream = (await client.run(RUN_ID)).stream_sample("Once")
            assert (await anext(stream)).text == "a"
            await stream.aclose()
            while not body.closed:
                await asyncio.sleep(0.01)

    in_loop(work())
    assert body.given == 2
