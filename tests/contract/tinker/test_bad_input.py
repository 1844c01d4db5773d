"""What must not break: clear errors on their own futures or a 4xx with JSON, and nobody else is disturbed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import tinker
from tinker import types

from tests.contract.tinker.support import (
    IDS,
    MODEL,
    PROMPT,
    STEP,
    datum,
    params,
    plain,
    policy,
    service_of,
    tensor,
)
from tests.contract.tinker.wire import Wire, message
from tests.support.stack import RunningStack

# What the SDK would try again, for minutes or without end.
REPEATED = {408, 409, 429, *range(500, 600)}


@pytest.fixture
def wire(stack: RunningStack) -> Iterator[Wire]:
    made = Wire(stack)
    yield made
    made.close()


def stable(answer: httpx2.Response) -> Any:
    """An error that stays one, in JSON."""
    assert 400 <= answer.status_code < 500 and answer.status_code not in REPEATED, answer.text
    assert answer.json()["detail"]
    return answer.json()


BAD_DATA = {
    "a token outside the vocabulary": plain([5, 6, 100_000, 7]),
    "a target outside the vocabulary": datum(target_tokens=tensor([512] * 12, "int64")),
    "targets that are too short": datum(target_tokens=tensor(IDS[1:5], "int64")),
    "no targets": datum(target_tokens=None),
    "weights that are no numbers": datum(weights=tensor([math.nan] * 12)),
    "weights without an end": datum(weights=tensor([math.inf] * 12)),
    "more tokens than the context": plain([5] * 4000),
    "a field that nobody knows": datum(mask=tensor([1.0] * 12)),
}


@pytest.mark.parametrize("what", list(BAD_DATA))
def test_bad_data_fails_alone_between_good(model: Any, what: str) -> None:
    before = model.forward([plain()], "cross_entropy")
    bad = model.forward_backward([plain(), BAD_DATA[what]], "cross_entropy")
    after = model.forward([plain()], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError) as caught:
        bad.result()
    assert caught.value.category == "user" and "data.1" in str(caught.value)
    assert before.result().metrics["loss:sum"] == after.result().metrics["loss:sum"]


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("ppo", {"clip_low_threshold": 7.0}),
        ("ppo", {"beta": 1.0}),
        ("dro", {"beta": math.inf}),
        ("dro", {"beta": "much"}),
        ("stable_reinforce", {}),
    ],
)
def test_bad_losses_fail_on_their_own_futures(model: Any, loss_fn: Any, config: Any) -> None:
    bad = model.forward_backward([policy()], loss_fn, config)
    good = model.forward([plain()], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError) as caught:
        bad.result()
    assert caught.value.category == "user"
    assert good.result().metrics["loss:sum"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": -1},
        {"beta1": 1.0},
        {"weight_decay": math.nan},
        {"grad_clip_norm": -1},
        {"momentum": 0.9},
    ],
)
def test_bad_steps_fail_on_their_own_futures(wire: Wire, changes: dict[str, Any]) -> None:
    model = wire.model()
    wire.loss(model, 1)
    params_ = {"learning_rate": 0.1, **changes}
    body = json.dumps({"model_id": model, "seq_id": 2, "adam_params": params_}).encode()
    bad = wire.http.post("/optim_step", content=body, headers={"Content-Type": "application/json"})
    found = wire.failure(bad)
    assert found["category"] == "user" and next(iter(changes)) in found["error"]
    # The gradient is there still, for a step that is right.
    assert "grad_norm" in wire.result(wire.step(model, 3)).json()["metrics"]


def test_a_step_without_a_gradient_and_an_optimizer_that_there_is_not(wire: Wire) -> None:
    model = wire.model()
    assert wire.failure(wire.step(model, 1))["code"] == "no_gradients"
    dimuon = {"type": "dimuon", "learning_rate": 0.1}
    other = wire.post("optim_step", model_id=model, seq_id=2, optimizer_params=dimuon)
    assert "AdamW" in wire.failure(other)["error"]


def test_an_empty_batch_fails_at_once(wire: Wire) -> None:
    model = wire.model()
    empty = message(model, 1)
    del empty.data[:]
    assert "empty" in wire.failure(wire.raw(empty.SerializeToString()))["error"]
    assert wire.number(wire.loss(model, 2)) > 0


def test_a_large_batch_keeps_nobody_waiting(stack: RunningStack, wire: Wire) -> None:
    model = wire.model()
    large = [plain([5 + at % 400 for at in range(2000)]) for _ in range(24)]
    slow = wire.loss(model, 1, *large)
    other = Wire(stack)
    assert other.number(other.loss(other.model(), 1)) > 0
    other.close()
    assert wire.number(slow) > 0


BODIES = {
    "no protobuf": (b"\xff\xff\xff", "application/x-protobuf"),
    "JSON": (b"{}", "application/json"),
    "nothing": (b"", "application/x-protobuf"),
}


@pytest.mark.parametrize("what", list(BODIES))
def test_bodies_that_are_no_request(wire: Wire, what: str) -> None:
    stable(wire.raw(*BODIES[what]))


def test_what_is_not_there_is_a_404(wire: Wire) -> None:
    for answer in (
        wire.loss("ses_0:train:0", 1),
        wire.step("ses_0:train:0", 1),
        wire.post("get_info", model_id="x\x00y"),
        wire.post("retrieve_future", request_id="fut_nothing"),
        wire.post("retrieve_future", request_id="made:ses_0:train:0"),
        wire.post("retrieve_future", request_id="\x00"),
        wire.post("session_heartbeat", session_id="ses_0"),
        wire.http.get("/samplers/ses_0:sample:0"),
        wire.http.get("/training_runs/ses_0:train:0"),
        wire.http.get("/training_runs/ses_0:train:0/checkpoints"),
        wire.http.get("/sessions/ses_0"),
        wire.post("weights_info", tinker_path="tinker://ses_0:train:0/weights/x"),
        wire.http.get("/external_weights/run_0123456789abcdef/x/9999999999/0/adapter_config.json"),
    ):
        assert answer.status_code == 404, answer.text
        stable(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("create_model", {"base_model": "gpt-5"}),
        ("create_model", {"lora_config": {"rank": 0}}),
        ("create_model", {"lora_config": {"rank": "8"}}),
        ("create_model", {"lora_config": None}),
        ("create_model", {"optimizer_config": {"type": "dimuon", "version": 1}}),
        ("create_model", {"session_id": "ses_0"}),
        ("create_model", {"surprise": 1}),
        ("load_weights", {"path": "/etc/passwd", "optimizer": False}),
        ("load_weights", {"path": "tinker://a/weights/../x", "optimizer": False}),
        ("retrieve_future", {}),
        ("create_sampling_session", {"session_id": "ses_0", "sampling_session_seq_id": 1}),
        ("weights_info", {"tinker_path": "x"}),
    ],
)
def test_requests_that_are_wrong_are_refused(wire: Wire, path: str, body: dict[str, Any]) -> None:
    if path == "create_model":
        lora = {"rank": 4}
        named = {"session_id": wire.session, "base_model": MODEL, "lora_config": lora}
        body = {**named, "model_seq_id": 9, **body}
    elif path == "load_weights":
        body = {**body, "session_id": wire.session, "model_seq_id": 9}
    stable(wire.post(path, **body))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 0},
        {"num_samples": -1},
        {"num_samples": 10_000},
        {"prompt": {"chunks": []}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [100_000]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": ["a"]}]}},
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5] * 5000}]}},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"max_tokens": 0}},
        {"sampling_params": {"top_p": 0}},
        {"sampling_params": {"stop": [1, "a"]}},
        {"topk_prompt_logprobs": 1000},
        {"prompt_logprobs_last_n": 2},
        {"prompt_alt_tokens_k": 2},
        {"seq_id": -1},
    ],
)
def test_samples_that_are_wrong_are_refused(wire: Wire, changes: dict[str, Any]) -> None:
    session = wire.ok(
        "create_sampling_session",
        session_id=wire.session,
        sampling_session_seq_id=0,
        base_model=MODEL,
    )["sampling_session_id"]
    asked = {
        "sampling_session_id": session,
        "seq_id": 1,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": IDS}]},
        "sampling_params": {"max_tokens": 1},
    }
    stable(wire.post("asample", **{**asked, **changes}))


def test_keys_are_needed(stack: RunningStack) -> None:
    url = f"{stack.base_url}/api/v1/get_server_capabilities"
    for headers in (
        {},
        {"X-API-Key": stack.api_key},
        {"X-API-Key": "tml-wrong"},
        {"X-API-Key": f"tml-{stack.api_key}x"},
        {"Authorization": f"Bearer {stack.api_key}"},
    ):
        answer = httpx2.get(url, headers=headers, trust_env=False)
        assert answer.status_code == 401
        stable(answer)


def test_names_are_taken_once_unless_they_are_to_be_overwritten(model: Any) -> None:
    model.save_state("mine").result()
    with pytest.raises(tinker.RequestFailedError, match="overwrite"):
        model.save_state("mine").result()
    assert model.save_state("mine", overwrite=True).result().path.endswith("/weights/mine")
    with pytest.raises(tinker.RequestFailedError):
        model.save_state("no such name/..").result()
    # Sampler weights have names of their own.
    assert model.save_weights_for_sampler("mine").result().path.endswith("/sampler_weights/mine")


def test_two_users_see_and_disturb_nothing_of_each_other(stack: RunningStack, model: Any) -> None:
    path = model.save_state("private").result().path
    before = model.forward([plain()], "cross_entropy").result().metrics["loss:sum"]
    key = stack.new_user("other")
    other, theirs = service_of(stack, key), Wire(stack, key)
    strange = theirs.post("get_info", model_id=model.model_id)
    assert strange.status_code == 404
    assert theirs.loss(model.model_id, 99).status_code == 404
    with pytest.raises(tinker.NotFoundError):
        other.create_training_client_from_state(path).result()
    with pytest.raises(tinker.NotFoundError):
        other.create_sampling_client(model_path=path).result()
    own = other.create_lora_training_client(base_model=MODEL, rank=4).result()
    for _ in range(3):
        own.forward_backward([plain()], "cross_entropy")
        own.optim_step(types.AdamParams(learning_rate=0.5, weight_decay=0.9)).result()
    own.forward_backward([plain([5, 6, 100_000])], "cross_entropy")
    assert model.forward([plain()], "cross_entropy").result().metrics["loss:sum"] == before
    rest = other.create_rest_client()
    runs = rest.list_training_runs(limit=100).result().training_runs
    assert [one.training_run_id for one in runs] == [own.model_id]
    assert rest.list_user_checkpoints().result().checkpoints == []
    theirs.close()
    other.close("success").result()


def test_a_closed_session_takes_nothing_more(stack: RunningStack) -> None:
    wire = Wire(stack)
    model = wire.model()
    wire.number(wire.loss(model, 1))
    wire.close()
    again = Wire(stack)
    again.session = wire.session
    assert again.post("session_heartbeat", session_id=wire.session).status_code == 410
    stable(again.post("create_model", session_id=wire.session, base_model=MODEL, model_seq_id=5))


def test_sampling_goes_on_from_the_weights_that_it_is_pinned_to(model: Any) -> None:
    sampler = model.save_weights_and_get_sampling_client().result()
    before = sampler.compute_logprobs(PROMPT).result()
    for _ in range(3):
        model.forward_backward([plain()], "cross_entropy")
        model.optim_step(STEP).result()
    assert sampler.compute_logprobs(PROMPT).result() == pytest.approx(before, abs=1e-5)
    newer = model.save_weights_and_get_sampling_client().result()
    assert newer.compute_logprobs(PROMPT).result()[3] != pytest.approx(before[3], abs=1e-4)
    greedy = params(temperature=0.0, seed=None)
    first, second = (sampler.sample(PROMPT, 1, greedy).result() for _ in range(2))
    assert list(first.sequences[0].tokens) == list(second.sequences[0].tokens)
