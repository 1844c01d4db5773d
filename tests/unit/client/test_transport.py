"""Sending: headers, idempotency keys, retries and what is never retried."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _transport
from rewardsignal._transport import encode
from tests.unit.client.wire import RUN, Wire, refusal, reply, sent

MODELS: dict[str, Any] = {"models": [], "data": []}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "FIRST_PAUSE_S", 0.001)


def test_headers() -> None:
    wire = Wire(reply(RUN))
    with wire.client() as client:
        client.create_run("tiny")
    head = wire.requests[0].headers
    assert head["Authorization"] == "Bearer sk-test"
    assert head["Content-Type"] == "application/json"
    assert head["Host"] == "signal.test"
    assert head["User-Agent"] == f"rewardsignal/{rs.__version__}"


def test_key_and_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNAL_API_KEY", "sk-env")
    monkeypatch.setenv("SIGNAL_BASE_URL", "http://env.test/")
    wire = Wire(reply(MODELS))
    with rs.SignalClient(transport=httpx2.MockTransport(wire)) as client:
        client.models()
    assert str(wire.requests[0].url) == "http://env.test/models"
    assert wire.requests[0].headers["Authorization"] == "Bearer sk-env"


def test_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNAL_API_KEY", raising=False)
    with pytest.raises(rs.AuthenticationError, match="SIGNAL_API_KEY"):
        rs.SignalClient()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://[::1"])
def test_bad_base_url(url: str) -> None:
    with pytest.raises(rs.SignalConnectionError, match="base_url"):
        rs.SignalClient("sk-test", url)


def test_bad_key() -> None:
    with pytest.raises(rs.AuthenticationError):
        rs.SignalClient("sk-test\n", "http://signal.test")


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(429, "queue_full", retryable=True),
        refusal(502, "unavailable", retryable=True),
        refusal(503, "unavailable", retryable=True),
        httpx2.Response(504, text="gateway timeout"),
        httpx2.ConnectError("refused"),
        httpx2.ConnectTimeout("slow"),
        httpx2.ReadError("reset"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("closed"),
    ],
)
def test_retried_under_one_key(trouble: httpx2.Response | Exception) -> None:
    wire = Wire(trouble, trouble, reply(RUN, 201))
    with wire.client() as client:
        assert client.create_run("tiny", name="n").info.current_step == 3
    assert len(wire.requests) == 3
    assert len({request.headers["Idempotency-Key"] for request in wire.requests}) == 1
    assert {request.content for request in wire.requests} == {wire.requests[0].content}


def test_each_call_has_its_own_key() -> None:
    wire = Wire(reply(RUN, 201))
    with wire.client() as client:
        client.create_run("tiny")
        client.create_run("tiny")
    first, second = (request.headers["Idempotency-Key"] for request in wire.requests)
    assert first != second


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 415, 422, 424, 500])
def test_stable_errors_are_not_retried(status: int) -> None:
    wire = Wire(refusal(status, "some_code"))
    with wire.client() as client, pytest.raises(rs.SignalAPIError) as caught:
        client.models()
    assert len(wire.requests) == 1
    assert caught.value.status_code == status
    assert caught.value.request_id == "req_1"


@pytest.mark.parametrize("status", [429, 503])
def test_the_servers_word_that_it_is_stable_counts(status: int) -> None:
    wire = Wire(refusal(status, "some_code", retryable=False))
    with wire.client() as client, pytest.raises(rs.SignalAPIError):
        client.models()
    assert len(wire.requests) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str) -> None:
    value = "0.2" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    wire = Wire(
        refusal(503, "unavailable", retryable=True, headers={"Retry-After": value}), reply(MODELS)
    )
    began = time.monotonic()
    with wire.client() as client:
        client.models()
    assert time.monotonic() - began >= (0.2 if form == "seconds" else 0.9)


def test_a_wait_beyond_the_budget_raises_at_once() -> None:
    busy = refusal(429, "queue_full", retryable=True, headers={"Retry-After": "3600"})
    wire = Wire(busy)
    with wire.client() as client, pytest.raises(rs.RateLimitError) as caught:
        client.models()
    assert len(wire.requests) == 1
    assert caught.value.retryable
    assert caught.value.retry_after == 3600


def test_retries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "FIRST_PAUSE_S", 0.05)
    wire = Wire(httpx2.ConnectError("refused"))
    with (
        wire.client(retry_for=0.3) as client,
        pytest.raises(rs.SignalConnectionError, match=r"signal\.test"),
    ):
        client.models()
    assert len(wire.requests) > 1


def test_a_server_never_seen_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "UNSEEN_RETRY_S", 0.1)
    began = time.monotonic()
    wire = Wire(httpx2.ConnectError("refused"))
    with wire.client(retry_for=60) as client, pytest.raises(rs.SignalConnectionError):
        client.models()
    assert time.monotonic() - began < 5


def test_answer_that_is_not_json() -> None:
    wire = Wire(httpx2.Response(200, text="<html>hello</html>"))
    with wire.client() as client, pytest.raises(rs.SignalAPIError, match="base_url"):
        client.models()


def test_closed_client() -> None:
    client = Wire(reply(MODELS)).client()
    client.close()
    with pytest.raises(rs.SignalConnectionError, match="closed"):
        client.models()


class Array:
    """Anything with `tolist`: a numpy array, a tensor."""

    def tolist(self) -> list[int]:
        return [1, 2]


def test_arrays_become_lists() -> None:
    assert encode({"tokens": Array()}) == b'{"tokens":[1,2]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\ud800"])
def test_what_is_not_json_is_refused_here(value: Any) -> None:
    with pytest.raises(rs.ValidationError, match="JSON"):
        encode({"value": value})


def test_text_travels_as_utf8() -> None:
    assert encode({"text": "é"}) == '{"text":"é"}'.encode()


@pytest.mark.parametrize("name", ["", "..", "a/../b", "run_1/.."])
def test_a_name_cannot_lead_to_another_path(name: str) -> None:
    wire = Wire(reply(RUN))
    with wire.client() as client, pytest.raises(rs.ValidationError):
        client.tokenizer_files(name)
    assert wire.requests == []


def test_none_is_left_out() -> None:
    wire = Wire(reply(RUN, 201))
    with wire.client() as client:
        client.create_run("tiny", labels={"team": "a"}, lora_r=8, seed=None)
    assert sent(wire.requests[0]) == {"base_model": "tiny", "labels": {"team": "a"}, "lora_r": 8}
