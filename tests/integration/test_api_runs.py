"""The life of a run over HTTP: made, listed, described, completed, cancelled."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.support.api import BATCH, Api, Run, error_of
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("runs-tester")) as found:
        yield found


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run(labels={"test": "runs"}) as found:
        yield found


def test_health_and_readiness_need_no_key(stack: RunningStack) -> None:
    for path, status in (("/health", "healthy"), ("/ready", "ready")):
        answer = httpx2.get(stack.base_url + path, trust_env=False)
        assert answer.status_code == 200
        assert answer.json()["status"] == status
        assert answer.headers["Signal-Version"]


def test_models_and_their_tokenizers(api: Api) -> None:
    listed = api.get("/models").json()
    assert listed["models"] == ["tiny"] == [entry["name"] for entry in listed["data"]]
    assert listed["data"][0]["vocab_size"] == 512
    files = api.get("/models/tiny/tokenizer").json()["files"]
    assert "tokenizer.json" in [file["name"] for file in files]
    error_of(api.get("/models/other/tokenizer"), 404, "not_found")


def test_a_run_is_described(api: Api, run: Run) -> None:
    body = run.get().json()
    assert (body["status"], body["base_model"], body["labels"]) == (
        "ready",
        "tiny",
        {"test": "runs"},
    )
    assert (body["next_seq"], body["applied_seq"], body["current_step"]) == (1, 0, 0)
    assert body["config"]["max_seq_length"] == 2048
    assert body["device"]["kind"] == "cpu"
    assert body["created_at"].endswith("Z")
    run.ok("/forward_backward", BATCH)
    run.ok("/optim_step")
    body = run.get("/status").json()
    assert (body["next_seq"], body["applied_seq"], body["current_step"]) == (3, 2, 1)
    state = run.get("/session_state").json()
    assert (state["status"], state["accumulation_count"]) == ("active", 0)
    assert state["worker"]["pid"]


def test_creation_is_idempotent(api: Api) -> None:
    headers = {"Idempotency-Key": "make-1"}
    body = {"base_model": "tiny", "name": "once"}
    first = api.post("/runs", body, headers=headers)
    again = api.post("/runs", {"name": "once", "base_model": "tiny"}, headers=headers)
    assert first.status_code == again.status_code == 201
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    error_of(
        api.post("/runs", {"base_model": "tiny"}, headers=headers), 409, "idempotency_conflict"
    )
    api.post(f"/runs/{first.json()['run_id']}/cancel")


def test_lists_are_paged_and_filtered(api: Api) -> None:
    made = [api.create(name=f"n{i}", labels={"page": "a", "i": str(i)}) for i in range(3)]
    for run_id in made:
        api.post(f"/runs/{run_id}/cancel")
    first = api.get("/runs", params={"label": "page=a", "limit": 2}).json()
    assert [run["run_id"] for run in first["data"]] == [made[2], made[1]]
    assert first["runs"] == first["data"]
    assert first["has_more"]
    query = {"label": "page=a", "limit": 2, "cursor": first["next_cursor"]}
    second = api.get("/runs", params=query).json()
    assert [run["run_id"] for run in second["data"]] == [made[0]]
    assert (second["has_more"], second["next_cursor"]) == (False, None)
    error_of(api.get("/runs", params={**query, "label": "i"}), 422, "bad_cursor")
    found = api.get("/runs", params={"label": "i=1", "status": "cancelled"}).json()["data"]
    assert [run["run_id"] for run in found] == [made[1]]
    assert api.get("/runs", params={"label": "i=1", "status": "ready"}).json()["data"] == []


def test_complete_saves_and_ends(api: Api, run: Run) -> None:
    run.ok("/forward_backward", BATCH)
    run.ok("/optim_step")
    ended = run.ok("/complete")
    assert (ended["status"], ended["artifact"], ended["current_step"]) == ("completed", "final", 1)
    assert run.ok("/complete")["success"]
    body = run.get().json()
    assert (body["status"], body["device"] is None, body["ended_at"] is None) == (
        "completed",
        False,
        False,
    )
    assert api.get("/runs", params={"status": "completed"}).json()["data"][0]["run_id"] == run.id
    for path in ("/forward_backward", "/optim_step_async", "/operations", "/save_state"):
        one = {"kind": "optim_step"}
        sent = (
            BATCH if "forward" in path else {"operations": [one]} if path == "/operations" else {}
        )
        error_of(run.post(path, sent), 409, "run_closed")
    error_of(run.post("/cancel"), 409, "run_closed")
    names = [one["name"] for one in run.get("/artifacts").json()["data"]]
    assert names == ["final"]


def test_complete_without_saving(run: Run) -> None:
    assert run.ok("/complete", {"save": False})["artifact"] is None
    assert run.get("/artifacts").json()["data"] == []


def test_cancel_ends_what_is_queued(api: Api) -> None:
    run = Run(api, api.create())
    futures = [run.post("/forward_backward_async", BATCH).json()["future_id"] for _ in range(3)]
    assert run.ok("/cancel")["status"] == "cancelled"
    ended = api.get("/futures", params={"ids": ",".join(futures), "wait": 5}).json()["data"]
    assert {one["status"] for one in ended} <= {"cancelled", "completed"}
    assert run.ok("/cancel")["success"], "a second time is no error"
    error_of(run.post("/complete"), 409, "run_closed")
    journal = run.get("/operations", params={"wait": 10}).json()
    assert len(journal["data"]) == 3, "what ended with the run is in the journal"
    last = run.get("/operations", params={"after_seq": 3, "wait": 10})
    assert last.elapsed.total_seconds() < 5, "nothing can come any more, so nothing is waited for"


def test_the_tokenizer_answers_beside_the_queue(run: Run) -> None:
    made = run.ok("/tokenize", {"text": ["hello world", "a"]})
    assert len(made["token_ids"]) == 2
    assert len(made["token_ids"][0]) == len(made["tokens"][0])
    assert run.ok("/detokenize", {"token_ids": made["token_ids"]})["text"] == ["hello world", "a"]
    assert run.ok("/detokenize", {"token_ids": made["token_ids"][0]})["text"] == "hello world"
    assert run.ok("/detokenize", {"token_ids": []})["text"] == ""
    error = error_of(
        run.post("/detokenize", {"token_ids": [[1], [9999]]}), 422, "token_out_of_range"
    )
    assert error["param"] == "token_ids.1.0"
    chat = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}
    rendered = run.ok("/apply_chat_template", chat)
    assert rendered["text"].endswith("assistant\n")
    assert run.get("/tokenizer_info").json()["special_tokens"]["eos"]
    info = run.get("/model_info").json()
    assert info["num_layers"] == 2
    assert 0 < info["num_trainable_parameters"] < info["num_parameters"]


def test_metrics_of_the_run_and_of_the_user(run: Run) -> None:
    loss = run.ok("/forward_backward", BATCH)["loss"]
    run.ok("/optim_step")
    key = {"Idempotency-Key": "reward-1"}
    mine = run.post("/metrics", {"metrics": {"reward": 1.5}}, headers=key)
    again = run.post("/metrics", {"metrics": {"reward": 1.5}}, headers=key)
    assert mine.status_code == 201
    assert again.json() == mine.json()
    rows = run.get("/metrics").json()["metrics"]
    assert sorted((row["seq"] or 0, row["source"]) for row in rows) == [
        (0, "user"),
        (1, "run"),
        (2, "run"),
    ]
    assert next(row for row in rows if row["seq"] == 1)["metrics"]["loss"] == loss
    page = run.get("/metrics", params={"limit": 2}).json()
    rest = run.get("/metrics", params={"cursor": page["next_cursor"]}).json()
    assert page["metrics"] + rest["metrics"] == rows


def test_a_user_has_so_many_unfinished_runs(stack: RunningStack) -> None:
    with Api(stack, stack.new_user("runs-many")) as api:
        _fill_up(api)


def _fill_up(api: Api) -> None:
    made = [api.create(dedicated=True) for _ in range(32)]
    error_of(api.post("/runs", {"base_model": "tiny"}), 409, "run_limit")
    positions = [
        run["queue_position"] for run in api.get("/runs", params={"limit": 5}).json()["data"]
    ]
    assert positions == sorted(positions, reverse=True)
    api.post(f"/runs/{made.pop()}/cancel")
    made.append(api.create())
    for run_id in made:
        api.post(f"/runs/{run_id}/cancel")
