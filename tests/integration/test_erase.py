"""Deleting a run: afterwards nothing of it is found, in whichever plane one looks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

import rewardsignal as rs
from tests.support.api import BATCH, Api, Run, error_of
from tests.support.inside import Inside, until
from tests.support.plan import futures
from tests.support.stack import RunningStack

MARK = "zebra-quagga-okapi"
LARGE = {"batch_data": [{"tokens": [7 * i % 500 + 5 for i in range(600)]}] * 40}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("eraser")) as found:
        yield found


@pytest.fixture(autouse=True)
def no_run_is_left(api: Api) -> Iterator[None]:
    """There are two devices, and branches are runs too."""
    yield
    for run in api.get("/runs", params={"limit": 100}).json()["data"]:
        if run["ended_at"] is None:
            api.post(f"/runs/{run['run_id']}/cancel")


@pytest.fixture(scope="module")
def inside(stack: RunningStack) -> Iterator[Inside]:
    with Inside(stack) as found:
        yield found


def certificate(run: Run) -> str:
    answer = run.get("/certificate")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["sha256"])


def erase(run: Run) -> None:
    answer = run.api.delete(f"/runs/{run.id}")
    assert answer.status_code == 204, answer.text
    assert answer.content == b""


def files_with(folder: Path, marks: dict[str, bytes]) -> dict[str, list[str]]:
    """For each mark, the files below a folder that hold it, in their content or their name."""
    found: dict[str, list[str]] = {name: [] for name in marks}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        where = path.relative_to(folder).as_posix()
        for name, mark in marks.items():
            if mark in content or mark in where.encode():
                found[name].append(where)
    return found


def left_in_files(folder: Path, marks: dict[str, bytes]) -> dict[str, list[str]]:
    """What is still found once files that were replaced are closed. Logs name runs, and say no more."""

    def look() -> dict[str, list[str]]:
        found = files_with(folder, marks)
        for name in ("run id", "its hexadecimals"):
            found[name] = [where for where in found[name] if not where.startswith("logs/")]
        return {name: files for name, files in found.items() if files}

    deadline = time.monotonic() + 5
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def in_redis(inside: Inside, marks: dict[str, bytes]) -> list[str]:
    """The marks that the server's memory holds, in a key's name or a value that is not compressed."""
    dumps = [(key, inside.redis.dump(key) or b"") for key in inside.redis.keys("*")]
    stream = str(inside.redis.xrange("sig:commits")).encode()
    return [
        name
        for name, mark in marks.items()
        if mark in stream or any(mark in key or mark in dump for key, dump in dumps)
    ]


def test_nothing_of_a_run_is_left_in_any_plane(
    api: Api, inside: Inside, stack: RunningStack
) -> None:
    key = {"Idempotency-Key": f"{MARK}-key"}
    body = {
        "base_model": "tiny",
        "lora_r": 4,
        "name": f"{MARK}-name",
        "labels": {"l": f"{MARK}-label"},
    }
    run = Run(api, api.post("/runs", body, headers=key).json()["run_id"])
    prompt = f"{MARK} prompt"
    ids = run.ok("/tokenize", {"text": prompt}, headers={"Idempotency-Key": f"{MARK}-t"})
    sampled = run.ok(
        "/sample", {"prompts": [prompt], "max_tokens": 40, "stop": [], "temperature": 2}
    )
    chat = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
    run.ok("/forward_backward", {"batch_data": [{"text": prompt}, {"messages": chat}]})
    run.ok("/forward_backward", LARGE)
    run.ok("/optim_step")
    run.ok("/save_state", {"name": f"{MARK}-artifact", "mode": "state"})
    run.post("/metrics", {"metrics": {f"{MARK}-metric": 1}}).raise_for_status()
    late = {"prompts": [prompt], "lane": f"{MARK}-lane", "client_seq": 2}
    pending = run.post("/sample_async", late).json()
    until(lambda: len(run.get("/artifacts").json()["data"]) == 1)
    marks = {
        "text": MARK.encode(),
        "run id": run.id.encode(),
        "its hexadecimals": run.id.removeprefix("run_").encode(),
        "prompt": msgpack.packb(ids["token_ids"][0]),
        "sampled tokens": json.dumps(sampled["token_ids"][0], separators=(",", ":")).encode(),
        "sampled text": json.dumps(sampled["outputs"][0]).encode(),
    }
    before = files_with(stack.data_dir, marks)
    assert all(before.values()), "the search finds what is there"
    assert {"signal.db", "redis", "store"} <= {
        where.split("/")[0].removesuffix("-wal") for found in before.values() for where in found
    }
    assert len(in_redis(inside, marks)) >= 3
    erase(run)
    gone_everywhere(run, pending["future_id"])
    assert left_in_files(stack.data_dir, marks) == {}
    assert in_redis(inside, marks) == []
    again = api.post("/runs", body, headers=key)
    assert again.status_code == 201
    assert "Idempotent-Replayed" not in again.headers
    assert again.json()["run_id"] != run.id
    erase(Run(api, again.json()["run_id"]))


def gone_everywhere(run: Run, future_id: str) -> None:
    """Every path that leads to it is a 404."""
    api, document = run.api, run.api.get("/openapi.json").json()
    bodies: dict[str, Any] = {
        "forward_backward": BATCH,
        "forward": BATCH,
        "sample": {"prompts": ["a"]},
        "stream": {"prompts": ["a"]},
        "operations": {"operations": [{"kind": "optim_step"}]},
        "tokenize": {"text": "a"},
        "detokenize": {"token_ids": [1]},
        "apply_chat_template": {"messages": [{"role": "user", "content": "a"}]},
        "metrics": {"metrics": {"a": 1}},
        "load_state": {"artifact": "a"},
    }
    ids = {
        "run_id": run.id,
        "future_id": future_id,
        "name": f"{MARK}-artifact",
        "path": "manifest.json",
    }
    tried = 0
    for path, item in document["paths"].items():
        for method in ("get", "post", "delete"):
            if method in item and ("{run_id}" in path or "{future_id}" in path):
                last = path.rsplit("/", 1)[1].removesuffix("_async")
                body = bodies.get(last, {}) if method == "post" else None
                answer = api.http.request(method, path.format(**ids), json=body)
                error_of(answer, 404, "not_found")
                tried += 1
    assert tried > 25
    error_of(api.get("/futures", params={"ids": future_id}), 404, "not_found")
    assert run.id not in api.get("/runs", params={"limit": 100}).text


def test_runs_in_every_state_can_be_deleted(api: Api) -> None:
    with api.run() as busy:
        sample = {"kind": "sample", "prompts": [[5]] * 8, "n": 8, "max_tokens": 2000, "stop": []}
        futures(busy, [sample, {"kind": "optim_step"}])
        paused = Run(api, api.create())
        paused.wait_ready()
        paused.ok("/pause")
        until(lambda: paused.get().json()["status"] == "paused")
        ended = Run(api, api.create())
        ended.ok("/cancel")
        never = Run(api, api.create())
        for run in (never, ended, paused, busy):
            erase(run)
            error_of(run.get(), 404, "not_found")
            error_of(api.delete(f"/runs/{run.id}"), 404, "not_found")
    with api.run() as run:
        assert run.ok("/forward_backward", BATCH)["loss"] > 0, "the devices are free again"


def test_a_branch_outlives_its_parent(api: Api) -> None:
    with api.run() as parent:
        parent.ok("/forward_backward", BATCH)
        parent.ok("/optim_step")
        parent.ok("/save_state", {"name": "base", "mode": "state"})
        state = certificate(parent)
        child = Run(api, parent.post("/branch").json()["run_id"])
        child.wait_ready()
        erase(parent)
    assert certificate(child) == state
    assert child.get().json()["parent"]["run_id"] == parent.id
    child.ok("/pause")
    until(lambda: child.get().json()["status"] == "paused")
    child.ok("/resume")
    assert certificate(child) == state, "rebuilt without its parent"
    erase(child)


def test_a_run_that_another_still_has_to_read_stays(api: Api) -> None:
    # No device is left for the child, and it joins nobody, as its parent does not.
    with api.run(dedicated=True) as parent, api.run(dedicated=True):
        parent.ok("/forward_backward", BATCH)
        child = Run(api, parent.post("/branch").json()["run_id"])
        error_of(api.delete(f"/runs/{parent.id}"), 409, "run_in_use")
        assert parent.ok("/optim_step")["step"] == 1, "nothing has happened to it"
        child.ok("/cancel")
        erase(parent)
        erase(child)


def test_the_sdk_deletes(stack: RunningStack) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run("tiny", lora_r=4)
        run.forward_backward([{"text": "one"}])
        run.delete()
        with pytest.raises(rs.NotFoundError):
            client.run(run.run_id)
        run.delete()


def test_metrics_and_lists_of_others_are_as_before(api: Api) -> None:
    with api.run(labels={"kept": "yes"}) as kept, api.run(labels={"kept": "no"}) as other:
        for run in (kept, other):
            run.ok("/forward_backward", BATCH)
        until(lambda: kept.get("/metrics").json()["metrics"])
        paths = ("/metrics", "/operations", "/events", "/artifacts")
        before = [kept.get(path).json() for path in paths]
        erase(other)
        assert [kept.get(path).json() for path in paths] == before
        listed = api.get("/runs", params={"label": "kept"}).json()["data"]
        assert [one["run_id"] for one in listed] == [kept.id]
