"""What stands where the network is: scripted answers, and a journal small enough to read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from rewardsignal import AsyncSignalClient, SignalClient

Answer = Callable[[httpx2.Request], httpx2.Response]

RUN = {
    "object": "run",
    "run_id": "run_0123456789abcdef",
    "base_model": "tiny",
    "status": "ready",
    "labels": {},
    "config": {"lora_r": 8},
    "current_step": 3,
}
TIMINGS = {"queued_ms": 1.0, "execute_ms": 2.0}


class Wire:
    """Keeps every request and answers with the scripted answers in turn, the last one for ever."""

    def __init__(self, *answers: httpx2.Response | Exception | Answer) -> None:
        self.requests: list[httpx2.Request] = []
        self.answers = list(answers)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx2.Response) else answer(request)

    def client(self, **options: Any) -> SignalClient:
        """A client whose network this is."""
        return SignalClient("sk-test", "http://signal.test", **self._as_network(options))

    def async_client(self, **options: Any) -> AsyncSignalClient:
        """The same of an event loop."""
        return AsyncSignalClient("sk-test", "http://signal.test", **self._as_network(options))

    def _as_network(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"retry_for": 5.0, **options, "transport": httpx2.MockTransport(self)}


def reply(body: Any, status: int = 200, **headers: str) -> httpx2.Response:
    """An answer of the server."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json=body, headers={"X-Request-Id": "req_1", **named})


def refusal(status: int, code: str, **fields: Any) -> httpx2.Response:
    """An answer in the one error shape."""
    headers = fields.pop("headers", {})
    body = {
        "code": code,
        "message": f"about {code}",
        "retryable": False,
        "request_id": "req_1",
        **fields,
    }
    return httpx2.Response(status, json={"error": body}, headers=headers)


def sent(request: httpx2.Request) -> Any:
    """The JSON body of a request."""
    return json.loads(request.content)


class Journal:
    """A run's operations: takes them, and ends them when the test says so."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.futures: list[dict[str, Any]] = []
        self.polls: list[list[str]] = []
        self.keys: list[str] = []
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        # While it is clear, requests that submit operations stand still; refused operations are of no seq.
        self.open = threading.Event()
        self.open.set()
        self.refuses: Callable[[str, dict[str, Any]], httpx2.Response | None] = lambda *_: None

    def client(self, **options: Any) -> SignalClient:
        """A client whose only server this is."""
        return Wire(self.answer).client(**options)

    def async_client(self, **options: Any) -> AsyncSignalClient:
        """The same of an event loop."""
        return Wire(self.answer).async_client(**options)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        """The server's side of runs, operations and futures."""
        path = request.url.path
        if request.method == "POST":
            self.keys.append(request.headers["Idempotency-Key"])
        if path.startswith("/futures"):
            return self._futures(request)
        run_id = path.split("/")[2]
        if path.endswith("/operations"):
            return self._take(
                run_id, [(one.pop("kind"), one) for one in sent(request)["operations"]]
            )
        if path.endswith("_async"):
            return self._take(
                run_id, [(path.rsplit("/", 1)[1].removesuffix("_async"), sent(request))]
            )
        return reply({**RUN, "run_id": run_id})

    def _take(self, run_id: str, operations: list[tuple[str, dict[str, Any]]]) -> httpx2.Response:
        """All of a request's operations, or none."""
        self.open.wait(10)
        for kind, body in operations:
            if (refusal := self.refuses(kind, body)) is not None:
                return refusal
        self.bodies += operations
        taken = [self._add(run_id, kind) for kind, _ in operations]
        return reply(taken[0] if len(taken) == 1 else {"data": taken}, 202)

    def answer_with(self, *results: Mapping[str, Any]) -> None:
        """End the next operations well, with these results."""
        pending = [one for one in self.futures if one["status"] == "pending"]
        with self.changed:
            for future, result in zip(pending, results, strict=False):
                own = {"seq": future["seq"], "timings": TIMINGS, **result}
                future.update(status="completed", error=None, result=own)
            self.changed.notify_all()

    def finish(self, count: int = 1, **error: Any) -> None:
        """End the next operations in their order, well or with `error`."""
        with self.changed:
            for future in [one for one in self.futures if one["status"] == "pending"][:count]:
                future["status"] = "failed" if error else "completed"
                future["error"] = error or None
                future["result"] = None if error else {"seq": future["seq"], "timings": TIMINGS}
            self.changed.notify_all()

    def cancel(self, index: int) -> None:
        """End one operation as cancelled."""
        with self.changed:
            self.futures[index].update(status="cancelled", error={"code": "cancelled"})
            self.changed.notify_all()

    def _add(self, run_id: str, kind: str) -> dict[str, Any]:
        seq = len(self.futures) + 1
        future = {"future_id": f"fut_{seq}", "run_id": run_id, "kind": kind, "seq": seq}
        self.futures.append({**future, "status": "pending", "result": None, "error": None})
        return self.futures[-1]

    def _cancelled(self, name: str) -> httpx2.Response:
        index = next(i for i, one in enumerate(self.futures) if one["future_id"] == name)
        if self.futures[index]["status"] != "pending":
            return refusal(409, "already_finished")
        self.cancel(index)
        return reply(self.futures[index])

    def _futures(self, request: httpx2.Request) -> httpx2.Response:
        query: Mapping[str, str] = request.url.params
        one = request.url.path.removeprefix("/futures").strip("/")
        if request.method == "DELETE":
            return self._cancelled(one)
        ids = [one] if one else query["ids"].split(",")
        found = [future for name in ids for future in self.futures if future["future_id"] == name]
        if len(found) < len(ids):
            return refusal(404, "not_found")
        if float(query.get("wait", 0)):
            self.polls.append(ids)
        with self.changed:
            enough = all if query.get("until") == "all" else any
            self.changed.wait_for(
                lambda: enough(future["status"] != "pending" for future in found),
                float(query.get("wait", 0)),
            )
            return reply(dict(found[0]) if one else {"data": [dict(future) for future in found]})
