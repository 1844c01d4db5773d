"""Requests of a model are executed by their seq_id, whatever the order of arrival, each once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contract.tinker.support import IDS, plain
from tests.contract.tinker.wire import LONG, Wire, message
from tests.support.stack import RunningStack


@pytest.fixture
def wire(stack: RunningStack) -> Iterator[Wire]:
    made = Wire(stack)
    yield made
    made.close()


def test_arrival_does_not_matter(wire: Wire) -> None:
    straight, mixed = wire.model(), wire.model()
    in_order = [wire.loss(straight, 1), wire.step(straight, 2), wire.loss(straight, 3)]
    last = wire.loss(mixed, 3)
    second = wire.step(mixed, 2)
    waiting = wire.post("retrieve_future", request_id=last.json()["request_id"])
    assert waiting.status_code == 408
    assert "has not arrived" in waiting.json()["queue_state_reason"]
    first = wire.loss(mixed, 1)
    assert [wire.number(in_order[0]), wire.number(in_order[2])] == [
        wire.number(first),
        wire.number(last),
    ]
    assert wire.result(second).json()["metrics"] == wire.result(in_order[1]).json()["metrics"]


def test_a_repeat_gets_the_first_request_and_another_under_its_number_a_400(wire: Wire) -> None:
    model = wire.model()
    first, again = wire.loss(model, 1), wire.loss(model, 1)
    assert first.json() == again.json()
    other = wire.loss(model, 1, plain(IDS[::-1]))
    assert (other.status_code, other.json()["code"]) == (400, "client_seq_conflict")
    step = wire.step(model, 2)
    assert wire.step(model, 2).json() == step.json()
    assert wire.step(model, 2, learning_rate=0.5).status_code == 400
    wire.number(first)
    # What was refused is remembered as well.
    empty = message(model, 3)
    del empty.data[:]
    refused = wire.raw(empty.SerializeToString())
    assert wire.raw(empty.SerializeToString()).json() == refused.json()
    assert wire.failure(refused)["category"] == "user"


def test_results_are_kept_and_read_again(wire: Wire) -> None:
    model = wire.model()
    first = wire.loss(model, 1)
    assert wire.result(first).content == wire.result(first).content


def test_models_sessions_and_sampling_sessions_are_made_once(wire: Wire) -> None:
    lora = {"rank": 4, "seed": 1}
    named = {"session_id": wire.session, "base_model": "tiny", "lora_config": lora}
    first = wire.ok("create_model", model_seq_id=70, **named)
    assert wire.ok("create_model", model_seq_id=70, **named) == first
    other = wire.post("create_model", model_seq_id=70, **{**named, "lora_config": {"rank": 5}})
    assert (other.status_code, other.json()["code"]) == (400, "client_seq_conflict")
    sampler = {"session_id": wire.session, "sampling_session_seq_id": 3, "base_model": "tiny"}
    made = wire.ok("create_sampling_session", **sampler)
    assert wire.ok("create_sampling_session", **sampler) == made


def test_samples_take_any_number_in_any_order_and_repeats_are_told_apart(wire: Wire) -> None:
    session = wire.ok(
        "create_sampling_session",
        session_id=wire.session,
        sampling_session_seq_id=0,
        base_model="tiny",
    )["sampling_session_id"]
    asked = {
        "sampling_session_id": session,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": IDS}]},
        "sampling_params": {"max_tokens": 2, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "num_samples": 2,
    }
    huge = wire.ok("asample", seq_id=2**62 + 1, **asked)
    zero = wire.ok("asample", seq_id=0, **asked)
    assert wire.ok("asample", seq_id=2**62 + 1, **asked) == huge
    assert len({*huge["sample_sequence_ids"], *zero["sample_sequence_ids"]}) == 4
    conflict = wire.post("asample", seq_id=0, **{**asked, "num_samples": 3})
    assert (conflict.status_code, conflict.json()["code"]) == (400, "client_seq_conflict")
    assert wire.result(huge).status_code == wire.result(zero).status_code == 200
    copies = [
        wire.ok("join_sampling_session", sampling_session_id=session)["client_counter"]
        for _ in range(2)
    ]
    assert copies == [1, 2]


def test_a_sample_is_cancelled(wire: Wire) -> None:
    long = wire.sample(wire.sampler(), 0, 64, **LONG)
    wire.ok("cancel_future", request_id=long)
    assert wire.result({"request_id": long}).json()["code"] == "cancelled"


def test_a_poll_that_waits_keeps_nobody_from_anything(stack: RunningStack, wire: Wire) -> None:
    model = wire.model()
    unanswerable = wire.step(model, 2).json()["request_id"]
    with ThreadPoolExecutor(8) as pool:
        others = [Wire(stack) for _ in range(4)]
        polls = [
            pool.submit(other.post, "retrieve_future", request_id=unanswerable) for other in others
        ]
        time.sleep(1.0)
        begun = time.monotonic()
        assert wire.number(wire.loss(model, 1)) > 0
        assert time.monotonic() - begun < 10
        assert {poll.result().status_code for poll in polls} == {200}
    for other in others:
        other.close()
