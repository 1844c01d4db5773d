"""Two users who cannot see each other: to a stranger, what exists and what does not look the same.

Every operation of the server's own document is tried, so that one that comes later is tried too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from tests.support.api import BATCH, Api, Run, error_of
from tests.support.inside import until
from tests.support.stack import RunningStack

LABEL = {"whose": "ann"}
KEY = {"Idempotency-Key": "the-same-for-both"}
BODIES: dict[str, dict[str, Any]] = {
    "forward_backward": BATCH,
    "forward": BATCH,
    "sample": {"prompts": ["a"], "max_tokens": 1},
    "stream": {"prompts": ["a"], "max_tokens": 1},
    "operations": {"operations": [{"kind": "optim_step"}]},
    "tokenize": {"text": "a"},
    "detokenize": {"token_ids": [1]},
    "apply_chat_template": {"messages": [{"role": "user", "content": "a"}]},
    "metrics": {"metrics": {"stolen": 1}},
    "load_state": {"artifact": "saved"},
}


@dataclass(frozen=True)
class Things:
    """What ann has."""

    run: Run
    future_id: str
    pending_id: str


@pytest.fixture(scope="module")
def ann(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("isolation-ann")) as found:
        yield found


@pytest.fixture(scope="module")
def bob(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("isolation-bob")) as found:
        yield found


@pytest.fixture(scope="module")
def things(ann: Api) -> Iterator[Things]:
    """A run with a step, an artifact, metrics, and an operation that waits for its lane."""
    with ann.run(name="secret plans", labels=LABEL) as run:
        run.ok("/forward_backward", BATCH)
        step = run.post("/optim_step")
        run.ok("/save_state", {"name": "saved"})
        run.post("/metrics", {"metrics": {"reward": 1}}).raise_for_status()
        late = {**BATCH, "lane": "late", "client_seq": 2}
        pending = run.post("/forward_backward_async", late).json()
        assert pending["status"] == "pending"
        # SQL learns of it a moment later, and must not do so between two looks.
        until(lambda: run.get("").json()["started_at"] and run.get("/artifacts").json()["data"])
        yield Things(run, step.headers["Signal-Future-Id"], pending["future_id"])


def everything(run: Run) -> list[Any]:
    """All that a stranger could have changed."""
    reads = ("", "/operations", "/metrics", "/artifacts")
    bodies = [run.get(path).json() for path in reads]
    state = run.get("/session_state").json()
    return [*bodies, *(state[name] for name in ("status", "accumulation_count", "queued"))]


def attempts(api: Api) -> list[tuple[str, str, Any]]:
    """Method, path with places for ids, and body of every operation on something of somebody's."""
    found = []
    for path, item in api.get("/openapi.json").json()["paths"].items():
        for method in ("get", "post", "delete"):
            if method in item and ("{run_id}" in path or "{future_id}" in path):
                last = path.rsplit("/", 1)[1].removesuffix("_async")
                found.append((method, path, BODIES.get(last, {}) if method == "post" else None))
    assert len(found) > 20
    return found


def test_no_operation_tells_a_stranger_whether_a_thing_exists(bob: Api, things: Things) -> None:
    before = everything(things.run)
    for future_id in (things.future_id, things.pending_id):
        real = {"run_id": things.run.id, "future_id": future_id, "name": "saved"}
        unreal = {
            "run_id": "run_0123456789abcdef",
            "future_id": "fut_0123456789abcdef_1_00000000_000000000000",
            "name": "saved",
        }
        for method, path, body in attempts(bob):
            answers = []
            for ids in (real, unreal):
                url = path.format(**ids, path="adapter_model.safetensors")
                answers.append(bob.http.request(method, url, json=body))
            foreign, missing = (error_of(answer, 404, "not_found") for answer in answers)
            assert foreign | {"request_id": ""} == missing | {"request_id": ""}, f"{method} {path}"
            assert answers[0].headers.keys() == answers[1].headers.keys()
    assert everything(things.run) == before


def test_lists_hold_only_what_is_one_s_own(ann: Api, bob: Api, things: Things) -> None:
    for query in ({}, {"label": "whose"}, {"label": "whose=ann"}, {"status": "ready"}):
        answer = bob.get("/runs", params=query)
        assert answer.json()["data"] == []
        assert "secret" not in answer.text
    with bob.run(name="secret plans", labels=LABEL) as own:
        assert [run["run_id"] for run in bob.get("/runs").json()["data"]] == [own.id]
        mine = [
            run["run_id"] for run in ann.get("/runs", params={"label": "whose=ann"}).json()["data"]
        ]
        assert mine == [things.run.id]


def test_a_cursor_leads_nobody_else_into_a_list(ann: Api, bob: Api, things: Things) -> None:
    with ann.run():
        cursor = ann.get("/runs", params={"limit": 1}).json()["next_cursor"]
        assert cursor
        error_of(bob.get("/runs", params={"cursor": cursor}), 422, "bad_cursor")


def test_one_foreign_future_among_one_s_own_refuses_the_whole(bob: Api, things: Things) -> None:
    with bob.run() as run:
        run.ok("/forward_backward", BATCH)
        own = run.post("/optim_step").headers["Signal-Future-Id"]
        assert bob.get("/futures", params={"ids": own}).json()["data"][0]["run_id"] == run.id
        for foreign in (things.future_id, things.pending_id):
            for ids in (f"{own},{foreign}", f"{foreign},{own}"):
                for query in ({"ids": ids}, {"ids": ids, "wait": 20, "until": "any"}):
                    answer = bob.get("/futures", params=query)
                    error_of(answer, 404, "not_found")
                    assert answer.elapsed.total_seconds() < 5, "a refusal waits for nothing"


def test_an_artifact_is_not_reached_through_a_run_of_one_s_own(bob: Api, things: Things) -> None:
    with bob.run() as run:
        for name, path in [
            ("saved", "adapter_config.json"),
            ("saved", "manifest.json"),
            (f"..%2F..%2F{things.run.id}%2Fsaved", "adapter_config.json"),
            ("..", f"{things.run.id}/artifacts/saved/adapter_config.json"),
            ("saved", f"..%2F..%2F..%2F{things.run.id}%2Fartifacts%2Fsaved%2Fadapter_config.json"),
        ]:
            answer = bob.get(f"/runs/{run.id}/artifacts/{name}/files/{path}")
            error_of(answer, 404, "not_found")


def test_the_same_idempotency_key_is_another_one_for_another_user(ann: Api, bob: Api) -> None:
    body = {"base_model": "tiny", "name": "keyed"}
    made = [api.post("/runs", body, headers=KEY) for api in (ann, bob)]
    ids = [answer.json()["run_id"] for answer in made]
    assert [answer.status_code for answer in made] == [201, 201]
    assert ids[0] != ids[1]
    assert all("Idempotent-Replayed" not in answer.headers for answer in made)
    runs = [Run(api, run_id) for api, run_id in zip((ann, bob), ids, strict=True)]
    for run in runs:
        rows = run.post("/metrics", {"metrics": {"a": 1}}, headers={"Idempotency-Key": "rows"})
        assert rows.status_code == 201
        assert "Idempotent-Replayed" not in rows.headers
        run.ok("/cancel")


def test_a_stranger_who_waits_is_not_woken(stack: RunningStack, bob: Api, things: Things) -> None:
    """A long poll on a foreign journal or future is refused at once, while its owner's is served."""
    answers: list[httpx2.Response] = []
    poll = f"/runs/{things.run.id}/operations"
    after = things.run.get().json()["applied_seq"]
    waiting = threading.Thread(
        target=lambda: answers.append(
            things.run.get("/operations", params={"after_seq": after, "wait": 20})
        )
    )
    waiting.start()
    error_of(bob.get(poll, params={"wait": 20}), 404, "not_found")
    error_of(bob.get(f"/futures/{things.pending_id}", params={"wait": 20}), 404, "not_found")
    things.run.ok("/sample", {"prompts": ["a"], "max_tokens": 1})
    waiting.join()
    assert [one["kind"] for one in answers[0].json()["data"]] == ["sample"]
