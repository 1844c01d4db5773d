"""Samples from any weights on a real worker: in order or beside it, together or alone, streamed, not lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.api import Api, Run, error_of
from tests.support.inside import Inside, until
from tests.support.stack import RunningStack

PROMPT = list(range(10, 22))
FB = {"batch_data": [{"tokens": list(range(5, 37))}]}
SAMPLE: dict[str, Any] = {
    "prompts": [PROMPT],
    "max_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "stop": [],
    "seed": 7,
    "logprobs": True,
}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    found = Api(stack, stack.new_user("sampler"))
    yield found
    found.http.close()


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def train(run: Run, rate: float = 0.05, steps: int = 1) -> None:
    for _ in range(steps):
        run.ok("/forward_backward", FB)
        run.ok("/optim_step", {"learning_rate": rate})


def sample(run: Run, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = run.ok("/sample", {**SAMPLE, **changes})
    return found


def begin(run: Run, body: dict[str, Any]) -> str:
    answer = run.post("/sample_async", body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["future_id"])


def only(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["samples"][0][0]
    return found


def scores(run: Run, weights: Any) -> list[float]:
    """Of a prompt's tokens, by these weights."""
    result = sample(run, weights=weights, max_tokens=0, prompt_logprobs=True)
    found: list[float] = result["prompt_logprobs"][0][1:]
    return found


def trained_scores(run: Run) -> list[float]:
    """The same by the trainer's own pass, of the live weights."""
    rows = run.ok("/forward", {"batch_data": [{"tokens": PROMPT}], "prompt_logprobs": True})["rows"]
    found: list[float] = rows[0]["logprobs"][:-1]
    return found


def future(api: Api, future_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/futures/{future_id}", params={"wait": 20}).json()
    return found


def test_every_source_is_what_it_says(api: Api, run: Run) -> None:
    base = trained_scores(run)
    train(run)
    run.ok("/save_state", {"name": "one"})
    saved = trained_scores(run)
    train(run)
    live = trained_scores(run)
    assert max(abs(a - b) for a, b in zip(base, live, strict=True)) > 1e-2
    with api.run(lora_r=2) as other:
        for asked, expected in (
            ("base", base),
            ({"artifact": "one"}, saved),
            ("current", live),
            ("live", live),
        ):
            assert scores(run, asked) == pytest.approx(expected, abs=1e-4)
        # From a run of another rank too.
        assert scores(other, {"artifact": "one", "run_id": run.id}) == pytest.approx(
            saved, abs=1e-4
        )
    steps = [
        sample(run, weights=asked)["weights_step"]
        for asked in ("base", {"artifact": "one"}, "live")
    ]
    assert steps == [None, 1, 2]


def test_only_the_live_weights_have_a_place_in_the_order(run: Run) -> None:
    train(run)
    run.ok("/save_state", {"name": "one"})
    seq = run.get().json()["next_seq"]
    for weights, source in (
        ("base", "base"),
        ("current", "current"),
        ({"artifact": "one"}, "saved"),
    ):
        result = sample(run, weights=weights)
        assert (result["seq"], result["weights"]["source"]) == (None, source)
    assert run.get().json()["next_seq"] == seq
    assert sample(run)["seq"] == seq


def test_a_live_sample_sees_the_weights_of_its_place(run: Run) -> None:
    operations = [
        {"kind": "sample", **SAMPLE},
        {"kind": "forward_backward", **FB},
        {"kind": "optim_step", "learning_rate": 0.05},
        {"kind": "sample", **SAMPLE},
        {"kind": "sample", **SAMPLE},
    ]
    answer = run.post("/operations", {"operations": operations})
    results = [future(run.api, one["future_id"])["result"] for one in answer.json()["data"]]
    assert [results[at]["weights_step"] for at in (0, 3, 4)] == [0, 1, 1]
    assert [results[at]["seq"] for at in (0, 3, 4)] == [1, 4, 5]
    before, after, again = (only(results[at]) for at in (0, 3, 4))
    assert before["logprobs"] != after["logprobs"]
    # The same seed draws the same, alone or beside another.
    assert (after["token_ids"], after["text"]) == (again["token_ids"], again["text"])


def test_a_pinned_sample_does_not_wait_for_training(run: Run) -> None:
    operations = [{"kind": "forward_backward", **FB}, {"kind": "optim_step"}] * 100
    sent = run.post("/operations", {"operations": operations}).json()["data"]
    sample(run, weights="base")
    assert run.get().json()["applied_seq"] < 200
    last = future(run.api, sent[-1]["future_id"])
    assert last["status"] == "completed"


def test_training_is_not_changed_by_what_is_sampled_beside_it(api: Api) -> None:
    certificates = []
    for beside in (False, True):
        with api.run(seed=5) as run:
            operations = [{"kind": "forward_backward", **FB}, {"kind": "optim_step"}] * 20
            sent = run.post("/operations", {"operations": operations}).json()["data"]
            pinned = []
            if beside:
                for weights in ("current", "base") * 4:
                    body = {**SAMPLE, "weights": weights, "max_tokens": 32}
                    pinned.append(begin(run, body))
            for one in (*(one["future_id"] for one in sent), *pinned):
                assert future(api, one)["status"] == "completed"
            found = run.get("/certificate").json()
            certificates.append({name: found[name] for name in ("weights", "moments", "step")})
    assert certificates[0] == certificates[1]


def test_deterministic_samples_equal_those_alone_bit_for_bit(run: Run) -> None:
    train(run)
    alone = only(sample(run, deterministic=True, max_tokens=24))
    others = [begin(run, {**SAMPLE, "seed": seed, "max_tokens": 40}) for seed in range(12)]
    beside = only(sample(run, deterministic=True, max_tokens=24, weights="current"))
    in_order = only(sample(run, deterministic=True, max_tokens=24))
    for one in others:
        assert future(run.api, one)["status"] == "completed"
    for found in (beside, in_order):
        assert (found["token_ids"], found["logprobs"]) == (alone["token_ids"], alone["logprobs"])


def test_log_probabilities_are_those_of_the_trainer(run: Run) -> None:
    train(run)
    result = sample(run, max_tokens=16, top_logprobs=3)
    found = only(result)
    tokens = PROMPT + found["token_ids"]
    rows = run.ok(
        "/forward", {"batch_data": [{"tokens": tokens}], "prompt_logprobs": True, "top_k": 3}
    )["rows"]
    place = slice(len(PROMPT) - 1, len(tokens) - 1)
    assert found["logprobs"] == pytest.approx(rows[0]["logprobs"][place], abs=1e-4)
    assert found["top_token_ids"] == rows[0]["top_token_ids"][place]
    for mine, theirs in zip(found["top_logprobs"], rows[0]["top_logprobs"][place], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_min_p_leaves_out_what_is_unlikely(run: Run) -> None:
    train(run, steps=3)
    greedy = only(sample(run, temperature=0))["token_ids"]
    assert only(sample(run, min_p=1.0, seed=3))["token_ids"] == greedy


def events(run: Run, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    with run.api.http.stream("POST", f"/runs/{run.id}/sample/stream", json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(
            "text/event-stream"
        )
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("weights", ["live", "base"])
def test_a_stream_gives_every_token_and_then_the_answer(run: Run, weights: str) -> None:
    body = {**SAMPLE, "weights": weights, "n": 3, "prompts": [PROMPT, PROMPT[:4]]}
    found = list(events(run, body))
    assert [found[0][0], found[-1][0]] == ["future", "result"]
    assert {name for name, _ in found[1:-1]} == {"token"}
    result = found[-1][1]
    for prompt in range(2):
        for copy in range(3):
            mine = [
                one for _, one in found[1:-1] if (one["prompt"], one["sample"]) == (prompt, copy)
            ]
            expected = result["samples"][prompt][copy]
            assert [one["token_id"] for one in mine] == expected["token_ids"]
            assert [one["logprob"] for one in mine] == expected["logprobs"]
            assert "".join(one["text"] for one in mine) == expected["text"]
    # It is an operation like any other.
    assert future(run.api, found[0][1]["future_id"])["result"] == result


def test_hanging_up_cancels_the_sample(run: Run) -> None:
    stream = events(run, {**SAMPLE, "max_tokens": 100_000, "weights": "current"})
    _, accepted = next(stream)
    assert next(stream)[0] == "token"
    stream.close()  # type: ignore[attr-defined]
    until(lambda: future(run.api, accepted["future_id"])["status"] == "cancelled")


def test_what_goes_wrong_in_a_stream_is_said_in_it(run: Run) -> None:
    with run.api.run(lora_r=2) as other:
        train(other, rate=1.0, steps=1)
        broken = {**SAMPLE, "weights": "live"}
        other.ok("/forward_backward", FB)
        other.ok("/optim_step", {"learning_rate": 1.0})
        found = list(events(other, broken))
    assert found[-1][0] in ("result", "error")
    answer = run.post("/sample/stream", {**SAMPLE, "weights": "nothing"})
    assert error_of(answer, 422, "validation_error")["param"] == "weights"


def test_samples_under_way_survive_their_worker(stack: RunningStack, run: Run) -> None:
    """Those in order and those beside it; the next worker begins them again."""
    train(run)
    expected = {
        weights: only(sample(run, weights=weights, max_tokens=400)) for weights in ("live", "base")
    }
    sent = {
        weights: begin(run, {**SAMPLE, "weights": weights, "max_tokens": 400})
        for weights in ("live", "base")
    }
    with Inside(stack) as inside:
        until(lambda: future_now(run.api, sent["base"])["status"] == "running", 10)
        os.kill(inside.worker_pids(run.id)[1], signal.SIGKILL)
    for weights, one in sent.items():
        until(lambda one=one: future_now(run.api, one)["status"] == "completed", 60)  # type: ignore[misc]
        found = only(future_now(run.api, one)["result"])
        assert found["token_ids"] == expected[weights]["token_ids"]
    train(run)


def future_now(api: Api, future_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/futures/{future_id}").json()
    return found


def test_many_at_once_end_and_the_worker_rests(run: Run) -> None:
    begun = time.monotonic()
    sent = [begin(run, {**SAMPLE, "seed": seed, "weights": "current"}) for seed in range(40)]
    found = [future(run.api, one) for one in sent]
    assert {one["status"] for one in found} == {"completed"} and time.monotonic() - begun < 60
    assert len({tuple(only(one["result"])["token_ids"]) for one in found}) > 30
    head = run.get().json()
    assert (head["status"], head["queued"]) == ("ready", 0)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"weights": "other"}, "weights"),
        ({"weights": {"artifact": "a/b"}}, "weights.artifact"),
        ({"weights": {"artifact": "one", "step": 3}}, "weights.step"),
        ({"weights": {"run_id": "run_1"}}, "weights"),
        ({"weights": 3}, "weights"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_prompt_logprobs": 2}, "top_prompt_logprobs"),
        ({"deterministic": "yes"}, "deterministic"),
        ({"n": 129}, "n"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_input_is_named(run: Run, changes: dict[str, Any], param: str) -> None:
    answer = run.post("/sample", {**SAMPLE, **changes})
    assert error_of(answer, 422, "validation_error")["param"] == param


def test_saved_states_of_others_are_not_found(api: Api, stack: RunningStack, run: Run) -> None:
    run.ok("/save_state", {"name": "mine"})
    other = Api(stack, stack.new_user("stranger"))
    with other, other.run() as theirs:
        asked = {"artifact": "mine", "run_id": run.id}
        error = error_of(theirs.post("/sample", {**SAMPLE, "weights": asked}), 404, "not_found")
        assert error["param"] == "weights.run_id"
    error = error_of(
        run.post("/sample", {**SAMPLE, "weights": {"artifact": "no"}}), 404, "not_found"
    )
    assert error["param"] == "weights.artifact"
