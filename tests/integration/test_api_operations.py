"""The primitives over HTTP: sync, async, batched, and as futures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from schemas.results import RESULTS, Future
from tests.support.api import BATCH, Api, Run, error_of
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("operations-tester")) as found:
        yield found


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def check(kind: str, body: Any) -> Any:
    """The body is what the schema of the kind says."""
    schema = RESULTS[kind](unknown="raise")
    assert not schema.validate(body)
    assert {name for name, field in schema.fields.items() if field.required} <= set(body)
    return body


def future(api: Api, answer: Any, wait: float = 20) -> Any:
    """The future behind a 202, once it has ended."""
    assert answer.status_code == 202, answer.text
    assert not Future(unknown="raise").validate(answer.json())
    assert answer.headers["Retry-After"]
    where = answer.headers["Location"]
    assert where == f"/futures/{answer.json()['future_id']}"
    found = api.get(where, params={"wait": wait})
    assert found.status_code == 200, found.text
    return found.json()


def test_the_loop(run: Run) -> None:
    losses = []
    for step in range(1, 4):
        losses.append(check("forward_backward", run.ok("/forward_backward", BATCH))["loss"])
        stepped = check("optim_step", run.ok("/optim_step", {"learning_rate": 0.01}))
        assert (stepped["step"], stepped["seq"]) == (step, 2 * step)
    assert losses == sorted(losses, reverse=True)
    sampled = check(
        "sample", run.ok("/sample", {"prompts": [[1, 2, 3]], "max_tokens": 4, "stop": []})
    )
    assert sampled["weights_step"] == 3
    assert sampled["prompt_token_ids"] == [[1, 2, 3]]
    assert sampled["token_ids"][0] == sampled["samples"][0][0]["token_ids"]
    saved = check("save_state", run.ok("/save_state"))
    assert saved["name"] == "step-000003"
    error_of(run.post("/save_state", {"name": "step-000003"}), 409, "name_taken")


def test_sampled_ids_go_into_training_as_they_are(run: Run) -> None:
    request = {"prompts": ["Once upon"], "max_tokens": 6, "stop": [], "temperature": 1.0, "seed": 7}
    first, again = run.ok("/sample", request), run.ok("/sample", request)
    assert first["samples"] == again["samples"]
    ids = first["prompt_token_ids"][0] + first["samples"][0][0]["token_ids"]
    weights = [0.0] * len(ids)
    weights[len(first["prompt_token_ids"][0]) - 1 : -1] = [1.0] * 6
    result = run.ok("/forward_backward", {"batch_data": [{"tokens": ids, "weights": weights}]})
    assert result["num_tokens"] == 6


def test_async_gives_the_future_that_can_be_polled(api: Api, run: Run) -> None:
    answer = run.post("/forward_backward_async", BATCH)
    sent = answer.json()
    assert (sent["kind"], sent["status"], sent["seq"], sent["tokens"]) == (
        "forward_backward",
        "pending",
        1,
        32,
    )
    done = future(api, answer)
    assert (done["status"], done["seq"], done["error"]) == ("completed", 1, None)
    assert done["submitted_at"] == sent["submitted_at"] <= done["started_at"] <= done["finished_at"]
    check("forward_backward", done["result"])
    error = error_of(api.delete(f"/futures/{done['future_id']}"), 409, "already_running")
    assert "completed" in error["message"]


def test_a_failure_of_the_worker_is_the_same_error_in_both_forms(api: Api, run: Run) -> None:
    sync = error_of(run.post("/optim_step"), 409, "no_gradients")
    failed = future(api, run.post("/optim_step_async"))
    assert failed["status"] == "failed"
    assert failed["result"] is None
    assert {**failed["error"], "request_id": sync["request_id"]} == sync
    assert run.ok("/forward_backward", BATCH)["seq"] == 3, "the run is usable"


def test_a_repeat_under_its_key_is_not_executed_again(run: Run) -> None:
    run.ok("/forward_backward", BATCH)
    key = {"Idempotency-Key": "step-1"}
    first = run.post("/optim_step", {"learning_rate": 0.1}, headers=key)
    again = run.post("/optim_step", {"learning_rate": 0.1}, headers=key)
    spelled = run.post("/optim_step", {"learning_rate": 0.1, "on_error": "fail"}, headers=key)
    assert first.json() == again.json() == spelled.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    error_of(run.post("/optim_step", headers=key), 409, "idempotency_conflict")
    assert run.get().json()["current_step"] == 1


def test_several_operations_at_once(api: Api, run: Run) -> None:
    step = {"kind": "optim_step", "learning_rate": 0.01}
    items = [{"kind": "forward_backward", **BATCH}, step] * 3
    items.append({"kind": "sample", "prompts": ["a"], "max_tokens": 2})
    key = {"Idempotency-Key": "batch"}
    answer = run.post("/operations", {"operations": items}, headers=key)
    assert answer.status_code == 202, answer.text
    sent = answer.json()["data"]
    assert [one["seq"] for one in sent] == list(range(1, 8))
    repeated = run.post("/operations", {"operations": items}, headers=key).json()["data"]
    ids = [one["future_id"] for one in sent]
    assert [one["future_id"] for one in repeated] == ids
    done = api.get("/futures", params={"ids": ",".join(ids), "wait": 20}).json()["data"]
    assert [one["future_id"] for one in done] == ids
    assert {one["status"] for one in done} == {"completed"}
    assert done[5]["result"]["step"] == 3
    journal = run.get("/operations", params={"limit": 4}).json()
    assert [one["seq"] for one in journal["data"]] == [1, 2, 3, 4]
    assert (journal["has_more"], journal["next_seq"], journal["applied_seq"]) == (True, 4, 7)
    rest = run.get("/operations", params={"after_seq": journal["next_seq"]}).json()
    assert [one["kind"] for one in rest["data"]] == ["forward_backward", "optim_step", "sample"]
    assert rest["has_more"] is False


def test_one_wrong_operation_keeps_all_out_and_every_wrong_field_is_named(run: Run) -> None:
    items = [
        {"kind": "forward_backward", "batch_data": [{"tokens": [1, 600]}]},
        {"kind": "optim_step"},
        {"kind": "sample", "prompts": [[700]]},
    ]
    error = error_of(run.post("/operations", {"operations": items}), 422, "validation_error")
    assert [one["param"] for one in error["details"]] == [
        "operations.0.batch_data.0.tokens.1",
        "operations.2.prompts.0.0",
    ]
    items = [{"kind": "explode"}, {"kind": "optim_step", "zzz": 1}, "x"]
    error = error_of(run.post("/operations", {"operations": items}), 422, "validation_error")
    assert [one["param"] for one in error["details"]] == [
        "operations.0.kind", "operations.1.zzz", "operations.2",
    ]  # fmt: skip
    assert run.get().json()["next_seq"] == 1


def test_a_long_poll_of_the_journal_wakes_up(api: Api, run: Run) -> None:
    began = time.monotonic()
    empty = run.get("/operations", params={"wait": 0.3}).json()
    assert empty["data"] == []
    assert time.monotonic() - began >= 0.3
    run.post("/forward_backward_async", BATCH)
    found = run.get("/operations", params={"wait": 20}).json()
    assert [one["status"] for one in found["data"]] == ["completed"]


def test_lanes_put_what_arrives_out_of_order_in_order(api: Api, run: Run) -> None:
    late = run.post("/optim_step_async", {"lane": "a", "client_seq": 2}).json()
    assert (late["seq"], late["lane"], late["client_seq"], late["position"]) == (None, "a", 2, None)
    first = run.post("/forward_backward_async", {**BATCH, "lane": "a", "client_seq": 1}).json()
    assert first["seq"] == 1
    done = api.get(f"/futures/{late['future_id']}", params={"wait": 20}).json()
    assert (done["status"], done["seq"]) == ("completed", 2)
    repeat = run.post("/optim_step_async", {"lane": "a", "client_seq": 2}).json()
    assert repeat["future_id"] == late["future_id"]
    other = {"lane": "a", "client_seq": 2, "learning_rate": 0.5}
    error_of(run.post("/optim_step_async", other), 409, "client_seq_conflict")


def test_a_queued_operation_can_be_cancelled_and_a_sample_stopped(api: Api, run: Run) -> None:
    slow = {"prompts": [[1]] * 8, "max_tokens": 2000, "stop": []}
    items = [{"kind": "sample", **slow}, {"kind": "optim_step"}]
    running, queued = run.post("/operations", {"operations": items}).json()["data"]
    assert api.delete(f"/futures/{queued['future_id']}").json()["status"] == "cancelled"
    assert api.delete(f"/futures/{queued['future_id']}").json()["status"] == "cancelled"
    stopped = api.delete(f"/futures/{running['future_id']}").json()["status"]
    assert stopped in ("stopping", "cancelled")
    ids = f"{running['future_id']},{queued['future_id']}"
    done = api.get("/futures", params={"ids": ids, "wait": 20}).json()["data"]
    assert [one["status"] for one in done] == ["cancelled", "cancelled"]
    assert run.ok("/forward_backward", BATCH)["seq"] == 3, "the order goes on without them"


def test_until_any_returns_with_the_first(api: Api, run: Run) -> None:
    items = [
        {"kind": "forward_backward", **BATCH},
        {"kind": "sample", "prompts": [[1]] * 4, "max_tokens": 1500, "stop": []},
    ]
    ids = [
        one["future_id"] for one in run.post("/operations", {"operations": items}).json()["data"]
    ]
    query = {"ids": ",".join(ids), "wait": 20, "until": "any"}
    done = api.get("/futures", params=query).json()["data"]
    assert done[0]["status"] == "completed"
    api.delete(f"/futures/{ids[1]}")


def test_results_are_the_bytes_that_the_worker_stored(api: Api, run: Run) -> None:
    sync = run.post("/forward_backward", BATCH)
    found = api.get(f"/futures/{sync.headers['Signal-Future-Id']}")
    assert sync.content in found.content
    assert json.loads(found.content)["result"] == sync.json()
