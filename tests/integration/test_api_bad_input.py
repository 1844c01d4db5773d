"""Bad input: each a 4xx that names the field, changes nothing, and leaves the run usable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.api import BATCH, Api, Run, error_of
from tests.support.stack import RunningStack

JSON = {"Content-Type": "application/json"}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("bad-input-tester")) as found:
        yield found


@pytest.fixture(scope="module")
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found
        assert found.ok("/forward_backward", BATCH)["loss"] > 0, "the run is usable after all of it"


def refused(run: Run, path: str, body: Any) -> dict[str, Any]:
    """POST what must be refused with 422 at admission; NaN is sent as such."""
    before = run.get().json()["next_seq"]
    answer = run.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == 422, answer.text
    assert run.get().json()["next_seq"] == before, "nothing entered the journal"
    return dict(answer.json()["error"])


def row(**fields: Any) -> list[dict[str, Any]]:
    return [{"text": "a fine row"}, fields]


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "hi"} for role in roles]}


@pytest.mark.parametrize(
    ("batch", "param"),
    [
        ([], "batch_data"),
        ([{"text": "a row"}] * 129, "batch_data"),
        ("text", "batch_data"),
        (row(), "batch_data.1.text"),
        (row(text=""), "batch_data.1.text"),
        (row(text=" \n"), "batch_data.1.text"),
        (row(text="x" * 32_769), "batch_data.1.text"),
        (row(text="x y " * 8_000), "batch_data.1.text"),
        (row(text="a", zzz=1), "batch_data.1.zzz"),
        (row(text="a row", tokens=[1, 2]), "batch_data.1.tokens"),
        (row(**chat("user", "robot")), "batch_data.1.messages.1.role"),
        (row(**chat("user")), "batch_data.1.messages"),
        (row(messages=[]), "batch_data.1.messages"),
        (row(**chat(*["user"] * 51)), "batch_data.1.messages"),
        (row(tokens=[1, 512]), "batch_data.1.tokens.1"),
        (row(tokens=[1, -2]), "batch_data.1.tokens.1"),
        (row(tokens=[1, 1.5]), "batch_data.1.tokens.1"),
        (row(tokens=[1, True]), "batch_data.1.tokens.1"),
        (row(tokens=[1, 10**30]), "batch_data.1.tokens.1"),
        (row(tokens=[1] * 2049), "batch_data.1.tokens"),
        (row(tokens=[1, 2], targets=[2]), "batch_data.1.targets"),
        (row(tokens=[1, 2], targets=[2, 600]), "batch_data.1.targets.1"),
        (row(tokens=[1, 2], weights=[1.0]), "batch_data.1.weights"),
        (row(tokens=[1, 2], weights=[1.0, NAN]), "batch_data.1.weights.1"),
        (row(tokens=[1, 2], weights=[INF, 1.0]), "batch_data.1.weights.0"),
        (row(tokens=[1, 2], weights=[1e39, 1.0]), "batch_data.1.weights.0"),
        (row(tokens=[1, 2], weights=[0, 0]), "batch_data.1.weights"),
        (row(text="a row", weights=[1.0]), "batch_data.1.weights"),
    ],
)  # fmt: skip
def test_rows(run: Run, batch: Any, param: str) -> None:
    assert refused(run, "/forward_backward", {"batch_data": batch})["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/forward_backward", {**BATCH, "loss_fn": "magic"}, "loss_fn"),
        ("/forward_backward", {**BATCH, "loss_kwargs": {"beta": 1}}, "loss_kwargs.beta"),
        ("/forward_backward", {**BATCH, "accumulate": "yes"}, "accumulate"),
        ("/forward_backward", {**BATCH, "advantages": [1.0]}, "advantages"),
        ("/forward_backward", {**BATCH, "lane": "a"}, "client_seq"),
        ("/optim_step", {"learning_rate": -1e-4}, "learning_rate"),
        ("/optim_step", {"learning_rate": 50}, "learning_rate"),
        ("/optim_step", {"learning_rate": NAN}, "learning_rate"),
        ("/optim_step", {"learning_rate": "0.1"}, "learning_rate"),
        ("/optim_step", {"beta1": 1.0}, "beta1"),
        ("/optim_step", {"on_error": "shrug"}, "on_error"),
        ("/sample", {}, "prompts"),
        ("/sample", {"prompts": []}, "prompts"),
        ("/sample", {"prompts": ["a", [1]]}, "prompts"),
        ("/sample", {"prompts": [""]}, "prompts.0"),
        ("/sample", {"prompts": [[1], [512]]}, "prompts.1.0"),
        ("/sample", {"prompts": [[1] * 2048]}, "prompts.0"),
        ("/sample", {"prompts": ["a"], "temperature": INF}, "temperature"),
        ("/sample", {"prompts": ["a"], "top_p": 0}, "top_p"),
        ("/sample", {"prompts": ["a"], "max_tokens": 0}, "max_tokens"),
        ("/sample", {"prompts": ["a"], "stop": ["a", 1]}, "stop"),
        ("/sample", {"prompts": ["a"] * 128, "n": 128}, "n"),
        ("/save_state", {"name": "../up"}, "name"),
        ("/save_state", {"mode": "merged"}, "mode"),
        ("/complete", {"name": "a/b"}, "name"),
        ("/metrics", {"metrics": {}}, "metrics"),
        ("/metrics", {"metrics": {"reward": NAN}}, "metrics.reward"),
        ("/tokenize", {"text": 5}, "text"),
        ("/detokenize", {"token_ids": [-1]}, "token_ids.0"),
        ("/apply_chat_template", {"messages": [{"role": "x", "content": ""}]}, "messages.0.role"),
        ("/cancel", {"force": True}, "force"),
    ],
)  # fmt: skip
def test_fields(run: Run, path: str, body: Any, param: str) -> None:
    assert refused(run, path, body)["param"] == param


def test_a_step_without_gradients(run: Run) -> None:
    error_of(run.post("/optim_step"), 409, "no_gradients")


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "malformed_json"),
        (b'{"batch_data": "\xff"}', JSON, 400, "malformed_json"),
        (b"[" * 100_000, JSON, 400, "malformed_json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (
            b"a=b",
            {"Content-Type": "application/x-www-form-urlencoded"},
            415,
            "unsupported_media_type",
        ),
    ],
)
def test_bodies(run: Run, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    error_of(run.post("/forward_backward", content=content, headers=headers), status, code)


def test_a_body_over_the_limit_also_in_chunks(run: Run) -> None:
    large = b'{"batch_data": "' + b"x" * (21 * 2**20) + b'"}'

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for content in (large, chunks()):
        error_of(
            run.post("/forward_backward", content=content, headers=JSON), 413, "payload_too_large"
        )
        assert run.get().status_code == 200, "the connection can be used again"


@pytest.mark.parametrize("name", ["nope", "../tiny", "/tmp", "org/model", "tiny/"])
def test_an_unlisted_model(api: Api, name: str) -> None:
    error = error_of(api.post("/runs", {"base_model": name}), 422, "unknown_model")
    assert error["param"] == "base_model"
