"""Requests that are wrong before their fields are read: by key, path, query, cursor, or the body as bytes."""

from __future__ import annotations

import http.client
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.support.api import BATCH, Api, Run, error_of
from tests.support.stack import RunningStack
from web.accounts.keys import new_key

JSON = {"Content-Type": "application/json"}
NO_RUN = "run_0123456789abcdef"
PUBLIC = ("/health", "/ready")


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("bad-requests")) as found:
        yield found


@pytest.fixture(scope="module")
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        found.ok("/forward_backward", BATCH)
        yield found
        assert found.get().json()["next_seq"] == 2, "nothing of all this entered the journal"
        assert found.ok("/optim_step")["step"] == 1


@pytest.fixture(scope="module")
def operations(stack: RunningStack) -> list[tuple[str, str]]:
    """Method and path of everything in the server's document that needs a key."""
    paths = httpx2.get(f"{stack.base_url}/openapi.json", trust_env=False).json()["paths"]
    methods = ("get", "post", "delete")
    return [(m, path) for path in paths for m in methods if m in paths[path] and path not in PUBLIC]


def filled(path: str, run_id: str) -> str:
    """A path of the document with ids in it."""
    values = {"run_id": run_id, "future_id": "fut_0", "name": "tiny", "path": "a"}
    return path.format(**values)


def query(path: str) -> dict[str, str]:
    return {"ids": "fut_0"} if path == "/futures" else {}


# --- who asks ---------------------------------------------------------------------------------


def test_nothing_answers_without_a_key(
    stack: RunningStack, run: Run, operations: list[tuple[str, str]]
) -> None:
    with httpx2.Client(base_url=stack.base_url, trust_env=False) as nobody:
        for method, path in operations:
            answer = nobody.request(method, filled(path, run.id), content=b"{", headers=JSON)
            error_of(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def wrong_keys(key: str) -> list[str]:
    """Headers that look like a good one."""
    last = "0" if key[-1] != "0" else "1"
    return [
        "", "Bearer", key, f"Basic {key}", f"Token {key}", f"Bearer {key[:-1]}",
        f"Bearer {key[:-1]}{last}", f"Bearer {key}x", f"Bearer {key} {key}", f"Bearer {key.upper()}",
        f"Bearer {new_key().text}", "Bearer sk-signal-", "Bearer null", "Bearer ' OR 1=1 --",
    ]  # fmt: skip


def test_a_wrong_key_opens_nothing(stack: RunningStack, run: Run) -> None:
    for header in wrong_keys(stack.api_key):
        for path in ("/runs", f"/runs/{run.id}"):
            answer = httpx2.get(
                stack.base_url + path, headers={"Authorization": header}, trust_env=False
            )
            error_of(answer, 401, "unauthorized")
            assert stack.api_key[20:] not in answer.text


# --- what is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run_id", [NO_RUN, "run_", "x", "run_0123456789ABCDEF", "%00", "..%2f..", "%F0%9F%98%80", "a" * 500]
)  # fmt: skip
def test_an_unknown_run(api: Api, operations: list[tuple[str, str]], run_id: str) -> None:
    for method, path in operations:
        if "{run_id}" in path:
            body = minimal(path) if method == "post" else None
            answer = api.http.request(method, filled(path, run_id), json=body)
            error_of(answer, 404, "not_found")


def minimal(path: str) -> dict[str, Any]:
    """A body that is right by its schema."""
    bodies: dict[str, dict[str, Any]] = {
        "forward_backward": BATCH,
        "forward": BATCH,
        "load_state": {"artifact": "a"},
        "sample": {"prompts": ["a"]},
        "stream": {"prompts": ["a"]},
        "operations": {"operations": [{"kind": "optim_step"}]},
        "tokenize": {"text": "a"},
        "detokenize": {"token_ids": [1]},
        "apply_chat_template": {"messages": [{"role": "user", "content": "a"}]},
        "metrics": {"metrics": {"a": 1}},
    }
    return bodies.get(path.rsplit("/", 1)[1].removesuffix("_async"), {})


@pytest.mark.parametrize(
    "future_id",
    [
        "x",
        "fut_",
        f"fut_{NO_RUN[4:]}_1_00000000_000000000000",
        "%00",
        "..%2f",
        "a" * 500,
        "fut_é_1_1_1",
    ],
)
def test_an_unknown_future(api: Api, future_id: str) -> None:
    error_of(api.get(f"/futures/{future_id}"), 404, "not_found")
    error_of(api.delete(f"/futures/{future_id}"), 404, "not_found")
    error_of(api.get(f"/futures?ids={future_id}"), 404, "not_found")


def test_unknown_paths_and_methods(api: Api, run: Run) -> None:
    for path in (
        "/",
        "/nothing",
        "/runs/",
        "//runs",
        f"/runs/{run.id}/",
        f"/runs/{run.id}/backward",
    ):
        error_of(api.http.get(path), 404, "not_found")
    for method, path in [("PUT", "/runs"), ("DELETE", "/runs"), ("PATCH", "/models")]:
        answer = api.http.request(method, path)
        error_of(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"]
    error_of(api.get(f"/runs/{run.id}/artifacts/none/files/adapter_config.json"), 404, "not_found")
    error_of(api.get("/models/..%2Ftiny/tokenizer"), 404, "not_found")


# --- queries and cursors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("/runs", "limit=0", "limit"),
        ("/runs", "limit=101", "limit"),
        ("/runs", "limit=x", "limit"),
        ("/runs", "limit=1.5", "limit"),
        ("/runs", "status=nope", "status"),
        ("/runs", "label=", "label"),
        ("/runs", "label=a%00b", "label"),
        ("/runs", "page=2", "page"),
        ("{run}/metrics", "limit=10001", "limit"),
        ("{run}/operations", "after_seq=-1", "after_seq"),
        ("{run}/operations", "wait=nan", "wait"),
        ("{run}/operations", "wait=26", "wait"),
        ("{run}/operations", "limit=1001", "limit"),
        ("{run}", "verbose=1", "verbose"),
        ("{run}/status", "x=", "x"),
        ("{run}/artifacts", "limit=1", "limit"),
        ("{run}/artifacts/a/files/b", "download=1", "download"),
        ("/models", "limit=1", "limit"),
        ("/futures", "", "ids"),
        ("/futures", "ids=", "ids"),
        ("/futures", "ids=" + ",".join(["fut_0"] * 151), "ids"),
        ("/futures", "ids=fut_0&until=some", "until"),
        ("/futures", "ids=fut_0&wait=inf", "wait"),
        ("/futures/fut_0", "wait=-1", "wait"),
        ("/futures/fut_0", "timeout=1", "timeout"),
    ],
)
def test_queries(api: Api, run: Run, path: str, query: str, param: str) -> None:
    answer = api.get(f"{path.format(run=f'/runs/{run.id}')}?{query}")
    assert error_of(answer, 422, "validation_error")["param"] == param


def test_a_query_where_none_is_taken(run: Run, operations: list[tuple[str, str]]) -> None:
    """Also on a POST: what a caller meant to say must not be dropped without a word."""
    for method, path in operations:
        if method == "post":
            answer = run.api.post(f"{filled(path, run.id)}?dry_run=1", minimal(path))
            assert error_of(answer, 422, "validation_error")["param"] == "dry_run"


def test_cursors(api: Api, run: Run) -> None:
    for step in range(2):
        assert run.post("/metrics", {"metrics": {"a": step}}).status_code == 201
    good = run.get("/metrics", params={"limit": 1}).json()["next_cursor"]
    position, mac = good.split("-")
    bad = [
        "",
        "x",
        "0",
        mac,
        f"{int(position) + 1}-{mac}",
        f"-{position}-{mac}",
        f"{good} ",
        "9" * 200,
    ]
    for cursor in bad:
        answer = run.get("/metrics", params={"cursor": cursor})
        assert answer.status_code == 422, cursor
        assert answer.json()["error"]["param"] == "cursor"
    error_of(api.get("/runs", params={"cursor": good}), 422, "bad_cursor")
    with api.run() as other:
        error_of(other.get("/metrics", params={"cursor": good}), 422, "bad_cursor")
    assert run.get("/metrics", params={"cursor": good}).status_code == 200


# --- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"a": 1', JSON, 400, "malformed_json"),
        (b"{'a': 1}", JSON, 400, "malformed_json"),
        (b'{"a": 1} {}', JSON, 400, "malformed_json"),
        (b"\xef\xbb\xbf{}", JSON, 400, "malformed_json"),
        (b'{"text": "\\ud800"}', JSON, 400, "malformed_json"),
        (b'{"a":' * 50_000, JSON, 400, "malformed_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", JSON, 400, "malformed_json"),
        (b"[]", JSON, 422, "validation_error"),
        (b"null", JSON, 422, "validation_error"),
        (b'"text"', JSON, 422, "validation_error"),
        (b"{}", {"Content-Type": "text/json"}, 415, "unsupported_media_type"),
        (b"{}", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
        (b"{}", {"Content-Type": "nonsense"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (zlib.compress(b"{}"), {**JSON, "Content-Encoding": "deflate"}, 415, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_every_post_refuses_a_body_that_is_none(
    run: Run,
    operations: list[tuple[str, str]],
    content: bytes,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    for method, path in operations:
        if method == "post":
            answer = run.api.post(filled(path, run.id), content=content, headers=headers)
            error_of(answer, status, code)


def test_a_length_over_the_limit_is_refused_before_the_body_comes(
    stack: RunningStack, run: Run
) -> None:
    parts = urlsplit(stack.base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.putrequest("POST", f"/runs/{run.id}/optim_step")
        connection.putheader("Authorization", run.api.http.headers["Authorization"])
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(21 * 2**20))
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert answer.status == 413
        assert b"payload_too_large" in answer.read()
    finally:
        connection.close()


def test_every_post_refuses_a_body_over_the_limit_also_in_chunks(
    run: Run, operations: list[tuple[str, str]]
) -> None:
    piece = b" " * 2**20

    def chunks() -> Iterator[bytes]:
        yield b"{"
        yield from [piece] * 20
        yield b"}"

    for path in ("/runs", f"/runs/{run.id}/metrics", f"/runs/{run.id}/operations"):
        answer = run.api.post(path, content=chunks(), headers=JSON)
        error_of(answer, 413, "payload_too_large")


def test_what_is_not_wrong_passes(run: Run) -> None:
    """A charset is no wrong type, chunks are no wrong body, and white space is none either."""
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert run.post("/tokenize", content=b' {"text": "a"}\n', headers=headers).status_code == 200
    parts = iter([b'{"text"', b': "a"}'])
    assert run.post("/tokenize", content=parts, headers=JSON).status_code == 200
