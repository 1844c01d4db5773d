"""A thin HTTP client for tests of the API itself; the SDK has tests of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from tests.support.stack import RunningStack

ROW = {"tokens": list(range(5, 37))}
BATCH = {"batch_data": [ROW]}
READY_S = 120.0


class Api:
    """One user at a running stack."""

    def __init__(self, stack: RunningStack, api_key: str | None = None) -> None:
        """The stack's first user, unless another's key is given."""
        self.http = httpx2.Client(
            base_url=stack.base_url,
            headers={"Authorization": f"Bearer {api_key or stack.api_key}"},
            timeout=40,
            trust_env=False,
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str, **kwargs: Any) -> httpx2.Response:
        """GET."""
        return self.http.get(path, **kwargs)

    def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx2.Response:
        """POST, by default with an empty object."""
        if "content" in kwargs:
            return self.http.post(path, **kwargs)
        return self.http.post(path, json={} if json is None else json, **kwargs)

    def delete(self, path: str) -> httpx2.Response:
        """DELETE."""
        return self.http.delete(path)

    def create(self, **config: Any) -> str:
        """A new run's id."""
        answer = self.post("/runs", {"base_model": "tiny", "lora_r": 4, **config})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run_id"])

    @contextmanager
    def run(self, **config: Any) -> Iterator[Run]:
        """A run that is ready, and cancelled at the end."""
        run = Run(self, self.create(**config))
        try:
            run.wait_ready()
            yield run
        finally:
            self.post(f"/runs/{run.id}/cancel")


class Run:
    """A run's paths."""

    def __init__(self, api: Api, run_id: str) -> None:
        self.api, self.id = api, run_id

    def get(self, path: str = "", **kwargs: Any) -> httpx2.Response:
        """GET below the run's path."""
        return self.api.get(f"/runs/{self.id}{path}", **kwargs)

    def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx2.Response:
        """POST below the run's path."""
        return self.api.post(f"/runs/{self.id}{path}", json, **kwargs)

    def ok(self, path: str, json: Any = None, **kwargs: Any) -> Any:
        """POST that must succeed with 200; its body."""
        answer = self.post(path, json, **kwargs)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_ready(self) -> None:
        """Until the run's worker holds it."""
        deadline = time.monotonic() + READY_S
        while (state := self.get().json())["status"] != "ready":
            assert state["status"] in ("queued", "loading", "rebuilding"), state
            assert time.monotonic() < deadline, state
            time.sleep(0.05)


def error_of(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer that must have this status and code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert error["request_id"] == answer.headers["X-Request-Id"]
    return dict(error)
