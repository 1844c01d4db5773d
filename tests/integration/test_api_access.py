"""Two users who cannot see each other, and files that are read only by their owner."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import httpx2
import pytest

from tests.support.api import BATCH, Api, Run, error_of
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def ann(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("access-ann")) as found:
        yield found


@pytest.fixture(scope="module")
def bob(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("access-bob")) as found:
        yield found


@pytest.fixture(scope="module")
def run(ann: Api) -> Iterator[Run]:
    """Ann's run, with one step taken and saved as "mine"."""
    with ann.run(labels={"whose": "ann"}) as found:
        found.ok("/forward_backward", BATCH)
        found.ok("/optim_step")
        found.ok("/save_state", {"name": "mine"})
        yield found


def test_another_users_things_are_not_there(run: Run, bob: Api) -> None:
    future_id = run.post("/forward_backward_async", BATCH).json()["future_id"]
    base = f"/runs/{run.id}"
    reads = ["", "/status", "/session_state", "/metrics", "/artifacts", "/operations",
             "/tokenizer_info", "/model_info", "/artifacts/mine/files/adapter_config.json"]  # fmt: skip
    for path in reads:
        error_of(bob.get(base + path), 404, "not_found")
    writes = {
        "/forward_backward": BATCH, "/forward_backward_async": BATCH, "/optim_step": {}, "/complete": {},
        "/sample": {"prompts": ["a"]}, "/save_state": {}, "/cancel": {}, "/metrics": {"metrics": {"a": 1}},
        "/operations": {"operations": [{"kind": "optim_step"}]}, "/tokenize": {"text": "a"},
        "/detokenize": {"token_ids": [1]},
        "/apply_chat_template": {"messages": [{"role": "user", "content": "a"}]},
    }  # fmt: skip
    for path, body in writes.items():
        error_of(bob.post(base + path, body), 404, "not_found")
    error_of(bob.get(f"/futures/{future_id}"), 404, "not_found")
    error_of(bob.get("/futures", params={"ids": future_id}), 404, "not_found")
    error_of(bob.delete(f"/futures/{future_id}"), 404, "not_found")
    assert bob.get("/runs").json()["data"] == []
    assert bob.get("/runs", params={"label": "whose=ann"}).json()["data"] == []
    assert run.get().json()["status"] == "ready", "nothing was changed"


def test_a_forged_future_is_not_there(run: Run, ann: Api) -> None:
    future_id = run.post("/forward_backward_async", BATCH).json()["future_id"]
    for forged in (
        future_id[:-1] + ("0" if future_id[-1] != "0" else "1"),
        "fut_x",
        future_id + "0",
    ):
        error_of(ann.get(f"/futures/{forged}"), 404, "not_found")


def test_a_file_is_streamed_with_ranges(run: Run, ann: Api) -> None:
    (artifact,) = run.get("/artifacts").json()["artifacts"]
    assert artifact["name"] == "mine"
    for file in artifact["files"]:
        whole = ann.get(file["url"])
        assert whole.status_code == 200
        assert len(whole.content) == file["size_bytes"]
        assert hashlib.sha256(whole.content).hexdigest() == file["sha256"]
        half = file["size_bytes"] // 2
        first = ann.get(file["url"], headers={"Range": f"bytes=0-{half - 1}"})
        second = ann.get(file["url"], headers={"Range": f"bytes={half}-"})
        assert (first.status_code, second.status_code) == (206, 206)
        assert first.content + second.content == whole.content
        assert (
            ann.get(file["url"], headers={"If-None-Match": whole.headers["ETag"]}).status_code
            == 304
        )
        beyond = ann.get(file["url"], headers={"Range": f"bytes={file['size_bytes']}-"})
        error_of(beyond, 416, "range_not_satisfiable")
    manifest = ann.get(f"/runs/{run.id}/artifacts/mine/files/manifest.json").json()
    assert manifest == artifact["manifest"]


@pytest.mark.parametrize(
    "path",
    ["..%2F..%2Fsecret", "../../../secret", "no.json", "%2Fetc%2Fpasswd", "adapter_config.json%00"],
)
def test_only_files_of_the_manifest_are_served(run: Run, ann: Api, path: str) -> None:
    error_of(ann.get(f"/runs/{run.id}/artifacts/mine/files/{path}"), 404, "not_found")


def test_without_a_key_nothing_is_said(stack: RunningStack, run: Run) -> None:
    for path in ("/runs", f"/runs/{run.id}", "/models", "/nothing/here"):
        answer = httpx2.get(stack.base_url + path, trust_env=False)
        error_of(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
