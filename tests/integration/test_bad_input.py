"""Bad input, request by request: a 4xx that names the field, nothing changed, and the run usable after it.

The rows of a batch and the commonest fields are in `test_api_bad_input`; what is wrong with a request
before its fields are read is in `test_bad_requests`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.api import BATCH, ROW, Api, Run, error_of
from tests.support.stack import RunningStack

JSON = {"Content-Type": "application/json"}
NAN, INF = float("nan"), float("inf")
STEP = {"kind": "optim_step"}
CHAT = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("bad-input")) as found:
        yield found


@pytest.fixture(scope="module")
def run(api: Api) -> Iterator[Run]:
    """A run with a step taken, a saved state, and a gradient that a bad request must not touch."""
    with api.run() as found:
        found.ok("/forward_backward", BATCH)
        found.ok("/optim_step")
        found.ok("/save_state", {"name": "there"})
        found.ok("/forward_backward", BATCH)
        yield found
        step = found.ok("/optim_step")
        assert step["step"] == 2
        assert step["grad_norm"] > 0


def facts(run: Run) -> dict[str, Any]:
    """What a refused request must leave as it was."""
    state = run.get("/session_state").json()
    names = ("next_seq", "applied_seq", "current_step", "accumulation_count", "queued", "status")
    return {name: state[name] for name in names}


def send(run: Run, path: str, body: Any) -> httpx2.Response:
    """POST with NaN and Infinity as they are, which the client's own encoder would refuse."""
    return run.post(path, content=json.dumps(body), headers=JSON)


def sample(**fields: Any) -> dict[str, Any]:
    return {"prompts": ["a"], **fields}


def numbered(**fields: Any) -> dict[str, Any]:
    return {**BATCH, "lane": "a", "client_seq": 1, **fields}


@pytest.mark.parametrize(
    ("path", "body", "params"),
    [
        # Every wrong field at once, each by its name.
        ("/forward_backward", {"batch_data": [], "accumulate": 1, "zzz": 0},
         {"batch_data", "accumulate", "zzz"}),
        ("/sample", {"prompts": ["a"], "n": 0, "top_p": 2, "stop": ""}, {"n", "top_p", "stop"}),
        ("/operations", {"operations": [STEP, {**STEP, "eps": -1}, {"kind": "sample"}]},
         {"operations.1.eps", "operations.2.prompts"}),
        # Numbers of an optimizer step.
        ("/optim_step", {"learning_rate": 1.001}, {"learning_rate"}),
        ("/optim_step", {"learning_rate": -INF}, {"learning_rate"}),
        ("/optim_step", {"learning_rate": None}, {"learning_rate"}),
        ("/optim_step", {"weight_decay": -0.1}, {"weight_decay"}),
        ("/optim_step", {"beta2": 1}, {"beta2"}),
        ("/optim_step", {"eps": NAN}, {"eps"}),
        ("/optim_step", {"grad_clip_norm": -1}, {"grad_clip_norm"}),
        ("/optim_step", {"grad_clip_norm": True}, {"grad_clip_norm"}),
        ("/optim_step", {"learning_rate": 10**400}, {"learning_rate"}),
        # Names of the client's own.
        ("/forward_backward", numbered(client_seq=0), {"client_seq"}),
        ("/forward_backward", numbered(client_seq=1.5), {"client_seq"}),
        ("/forward_backward", numbered(client_seq=2**53 + 1), {"client_seq"}),
        ("/forward_backward", numbered(lane=""), {"lane"}),
        ("/forward_backward", numbered(lane="a b"), {"lane"}),
        ("/forward_backward", numbered(lane="a\n"), {"lane"}),
        ("/optim_step", {"client_seq": 1}, {"lane"}),
        # The loss.
        ("/forward_backward", {**BATCH, "loss_fn": None}, {"loss_fn"}),
        ("/forward_backward", {**BATCH, "loss_fn": ""}, {"loss_fn"}),
        ("/forward_backward", {**BATCH, "loss_kwargs": []}, {"loss_kwargs"}),
        ("/forward_backward", {**BATCH, "loss_kwargs": {"a": 1, "b": 2}},
         {"loss_kwargs.a", "loss_kwargs.b"}),
        ("/forward_backward", {"batch_data": [None, "a", 1]},
         {"batch_data.0", "batch_data.1", "batch_data.2"}),
        ("/forward_backward", {"batch_data": {"0": ROW}}, {"batch_data"}),
        ("/forward_backward", {"batch_data": [{"messages": [{"role": "user"}]}]},
         {"batch_data.0.messages.0.content"}),
        # Sampling.
        ("/sample", sample(max_tokens=131_073), {"max_tokens"}),
        ("/sample", sample(max_tokens=1.0), {"max_tokens"}),
        ("/sample", sample(temperature=-0.1), {"temperature"}),
        ("/sample", sample(temperature=NAN), {"temperature"}),
        ("/sample", sample(top_p=1.1), {"top_p"}),
        ("/sample", sample(top_p=-1), {"top_p"}),
        ("/sample", sample(top_k=-2), {"top_k"}),
        ("/sample", sample(top_k=2.5), {"top_k"}),
        ("/sample", sample(n=129), {"n"}),
        ("/sample", sample(seed=2**63), {"seed"}),
        ("/sample", sample(seed="1"), {"seed"}),
        ("/sample", sample(stop=["x"] * 17), {"stop"}),
        ("/sample", sample(stop=["x" * 257]), {"stop"}),
        ("/sample", sample(stop=[-1]), {"stop"}),
        ("/sample", sample(logprobs=1), {"logprobs"}),
        ("/sample", sample(best_of=2), {"best_of"}),
        ("/sample", sample(prompts=["a"] * 129), {"prompts"}),
        ("/sample", sample(prompts="a"), {"prompts"}),
        ("/sample", sample(prompts=["x" * 32_769]), {"prompts.0"}),
        ("/sample", sample(prompts=[[1, -1], [1.5]]), {"prompts.0.1", "prompts.1.0"}),
        ("/sample", sample(prompts=[[CHAT, {"role": "robot", "content": "a"}]]),
         {"prompts.0.1.role"}),
        # Names of files.
        ("/save_state", {"name": ".."}, {"name"}),
        ("/save_state", {"name": "a b"}, {"name"}),
        ("/save_state", {"name": "a\n"}, {"name"}),
        ("/save_state", {"name": "a\x00b"}, {"name"}),
        ("/save_state", {"name": "x" * 101}, {"name"}),
        ("/complete", {"save": "no"}, {"save"}),
        # Several at once.
        ("/operations", {"operations": []}, {"operations"}),
        ("/operations", {"operations": [STEP] * 257}, {"operations"}),
        ("/operations", {"operations": {}}, {"operations"}),
        ("/operations", {"operations": [{}]}, {"operations.0.kind"}),
        ("/operations", {"operations": [{"kind": ["sample"]}]}, {"operations.0.kind"}),
        ("/operations", {"operations": [{"kind": "complete"}]}, {"operations.0.kind"}),
        # The user's own numbers.
        ("/metrics", {"metrics": {"a b": 1}}, {"metrics.a b"}),
        ("/metrics", {"metrics": {"a": True}}, {"metrics.a"}),
        ("/metrics", {"metrics": {"a": "1"}}, {"metrics.a"}),
        ("/metrics", {"metrics": {"a": 10**400}}, {"metrics.a"}),
        ("/metrics", {"metrics": {f"n{i}": i for i in range(101)}}, {"metrics"}),
        ("/metrics", {"metrics": {"a": 1}, "step": -1}, {"step"}),
        # The tokenizer.
        ("/tokenize", {"text": []}, {"text"}),
        ("/tokenize", {"text": ["a"] * 129}, {"text"}),
        ("/tokenize", {"text": ["a", 1]}, {"text.1"}),
        ("/tokenize", {"text": "a", "add_special_tokens": None}, {"add_special_tokens"}),
        ("/detokenize", {"token_ids": "1"}, {"token_ids"}),
        ("/detokenize", {"token_ids": [1, 512]}, {"token_ids.1"}),
        ("/detokenize", {"token_ids": [1, [2]]}, {"token_ids.1"}),
        ("/apply_chat_template", {"messages": []}, {"messages"}),
        ("/apply_chat_template", {"messages": [CHAT] * 51}, {"messages"}),
        ("/apply_chat_template", {"messages": [{**CHAT, "name": "x"}]}, {"messages.0.name"}),
    ],
)  # fmt: skip
def test_fields_of_a_run_s_calls(run: Run, path: str, body: Any, params: set[str]) -> None:
    before = facts(run)
    answer = send(run, path, body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert {detail["param"] for detail in error["details"]} == params
    assert error["param"] in params
    assert error["retryable"] is False
    assert facts(run) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"base_model": None}, "base_model"),
        ({"base_model": 1}, "base_model"),
        ({"base_model": ""}, "base_model"),
        ({"base_model": "x" * 201}, "base_model"),
        *(({"base_model": name}, "base_model") for name in (
            ".", "..", "./tiny", "tiny/../tiny", "/", "/etc/passwd", "~/tiny", "tiny\x00", "C:\\tiny",
            "file:///tmp/tiny", "https://example.org/tiny", "%2e%2e/tiny", "TINY", " tiny",
        )),
        ({"base_modell": "tiny"}, "base_modell"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": -1e-4}, "learning_rate"),
        ({"learning_rate": 1.5}, "learning_rate"),
        ({"learning_rate": NAN}, "learning_rate"),
        ({"weight_decay": INF}, "weight_decay"),
        ({"lora_r": -1}, "lora_r"),
        ({"lora_r": 0, "use_dora": True}, "use_dora"),
        ({"lora_r": 513}, "lora_r"),
        ({"lora_r": 8.0}, "lora_r"),
        ({"lora_r": True}, "lora_r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 0.6}, "lora_dropout"),
        ({"lora_dropout": 0.1, "use_dora": True}, "lora_dropout"),
        ({"lora_target_modules": ["q_proj"], "train_unembed": True}, "train_unembed"),
        ({"train_attn": False, "train_mlp": False}, "train_attn"),
        ({"lora_rank_pattern": {"up_proj": 513}}, "lora_rank_pattern.up_proj.value"),
        ({"lora_rank_pattern": {"nothing": 4}}, "lora_rank_pattern.nothing"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"quantization": "fp4"}, "quantization"),
        ({"lora_target_modules": []}, "lora_target_modules"),
        ({"lora_target_modules": ["q_proj", "nope"]}, "lora_target_modules.1"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"lr_scheduler": "cosine"}, "total_steps"),
        ({"lr_scheduler": "linear", "total_steps": 5, "warmup_steps": 5}, "warmup_steps"),
        ({"total_steps": 10}, "total_steps"),
        ({"warmup_steps": 10}, "warmup_steps"),
        ({"gpu_config": "8xH100"}, "gpu_config"),
        ({"max_seq_length": 0}, "max_seq_length"),
        ({"max_seq_length": 2049}, "max_seq_length"),
        ({"bf16": "yes"}, "bf16"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": {f"l{i}": "" for i in range(17)}}, "labels"),
        ({"labels": {"a b": "x"}}, "labels.a b"),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"labels": {"a": "x" * 257}}, "labels.a"),
    ],
)  # fmt: skip
def test_fields_of_a_new_run(api: Api, run: Run, fields: dict[str, Any], param: str) -> None:
    before = api.get("/runs").json()["data"][0]["run_id"]
    answer = api.post("/runs", content=json.dumps({"base_model": "tiny", **fields}), headers=JSON)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == param
    assert api.get("/runs").json()["data"][0]["run_id"] == before, "no run was made"


def test_what_only_the_worker_can_know_is_a_failed_future_and_changes_nothing(
    api: Api, run: Run
) -> None:
    cases = [
        ("save_state", {"name": "there"}, "name_taken"),
        ("forward_backward", {**BATCH, "loss_fn": "cross_entropy"}, "mixed_reductions"),
    ]
    for kind, body, code in cases:
        before = facts(run)
        error_of(run.post(f"/{kind}", body), 409, code)
        future_id = run.post(f"/{kind}_async", body).json()["future_id"]
        future = api.get(f"/futures/{future_id}", params={"wait": 20}).json()
        assert (future["status"], future["error"]["code"], future["result"]) == (
            "failed",
            code,
            None,
        )
        taken = {name: before[name] + 2 for name in ("next_seq", "applied_seq")}
        assert facts(run) == before | taken, "two places in the order are used, nothing else"


def test_a_step_without_gradients_changes_nothing(api: Api) -> None:
    with api.run() as run:
        error_of(run.post("/optim_step"), 409, "no_gradients")
        future_id = run.post("/optim_step_async").json()["future_id"]
        future = api.get(f"/futures/{future_id}", params={"wait": 20}).json()
        assert (future["status"], future["error"]["code"]) == ("failed", "no_gradients")
        assert facts(run)["current_step"] == 0
        run.ok("/forward_backward", BATCH)
        assert run.ok("/optim_step")["step"] == 1


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 256, "é".encode()])
def test_an_impossible_idempotency_key(run: Run, key: bytes) -> None:
    before = facts(run)
    for path in ("/optim_step", "/metrics", "/tokenize"):
        bodies = {"/metrics": {"metrics": {"a": 1}}, "/tokenize": {"text": "a"}}
        answer = run.post(path, bodies.get(path), headers=[(b"Idempotency-Key", key)])
        assert error_of(answer, 422, "validation_error")["param"] == "Idempotency-Key"
    assert facts(run) == before


def test_a_used_idempotency_key(api: Api, run: Run) -> None:
    key = {"Idempotency-Key": "used"}
    first = run.post("/metrics", {"metrics": {"a": 1}}, headers=key)
    assert first.status_code == 201
    before = facts(run)
    rows = len(run.get("/metrics").json()["metrics"])
    error_of(run.post("/metrics", {"metrics": {"a": 2}}, headers=key), 409, "idempotency_conflict")
    error_of(run.post("/tokenize", {"text": "a"}, headers=key), 409, "idempotency_conflict")
    error_of(api.post("/runs", {"base_model": "tiny"}, headers=key), 409, "idempotency_conflict")
    assert run.post("/metrics", {"metrics": {"a": 1}}, headers=key).json() == first.json()
    assert facts(run) == before
    assert len(run.get("/metrics").json()["metrics"]) == rows


CALLS: dict[str, Any] = {
    "/forward_backward": BATCH,
    "/forward_backward_async": BATCH,
    "/optim_step": {},
    "/optim_step_async": {},
    "/sample": sample(),
    "/sample_async": sample(),
    "/save_state": {},
    "/save_state_async": {},
    "/operations": {"operations": [{"kind": "forward_backward", **BATCH}, STEP]},
}


@pytest.mark.parametrize("how", ["complete", "cancel"])
def test_operations_on_a_run_that_has_ended(api: Api, how: str) -> None:
    run = Run(api, api.create())
    run.ok(f"/{how}", {"save": False} if how == "complete" else {})
    before = run.get().json()
    for path, body in CALLS.items():
        error = error_of(run.post(path, body), 409, "run_closed")
        assert before["status"] in error["message"]
        assert error["retryable"] is False
    other = {"complete": "/cancel", "cancel": "/complete"}[how]
    error_of(run.post(other), 409, "run_closed")
    assert run.get().json() == before
    # A run whose worker holds it is completed by an operation, so that its certificate is kept.
    kinds = {one["kind"] for one in run.get("/operations").json()["data"]}
    assert kinds <= ({"complete"} if how == "complete" else set())
    assert run.ok("/tokenize", {"text": "a"})["token_ids"], "what reads only goes on"
