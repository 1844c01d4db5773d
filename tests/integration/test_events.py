"""What happens to a run, as its owner follows it: a list, a long poll, a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from tests.support.api import BATCH, Api, Run, error_of
from tests.support.inside import until
from tests.support.stack import RunningStack

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("events")) as found:
        yield found


def types(run: Run, **query: Any) -> list[str]:
    return [event["type"] for event in run.get("/events", params=query).json()["data"]]


def streamed(run: Run, into: list[dict[str, str]], last: int = 0) -> int:
    """Reads the run's stream to its end; the status."""
    headers = {**STREAM, "Last-Event-ID": str(last)} if last else STREAM
    path = f"/runs/{run.id}/events"
    with run.api.http.stream("GET", path, headers=headers, timeout=60) as answer:
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif event:
                into.append(event)
                event = {}
    return answer.status_code


def test_a_runs_life_is_told_in_order(api: Api) -> None:
    with api.run() as run:
        until(lambda: types(run) == ["placed", "ready"])
        run.ok("/forward_backward", BATCH)
        run.post("/pause")
        until(lambda: run.get().json()["status"] == "paused")
        run.post("/resume")
        run.wait_ready()
        run.ok("/complete", {"save": False})
    expected = ["placed", "ready", "paused", "resumed", "placed", "rebuilt", "ready", "closed"]
    page = until(lambda: (now := run.get("/events").json())["ended"] and now)
    assert [event["type"] for event in page["data"]] == expected
    ids = [event["id"] for event in page["data"]]
    assert ids == sorted(set(ids))
    at = [event["at"] for event in page["data"]]
    assert at == sorted(at)
    facts = {event["type"]: event["data"] for event in page["data"]}
    assert facts["paused"] == {"reason": "user"}
    assert facts["rebuilt"]["to_seq"] == 1
    assert facts["closed"] == {"status": "completed", "error": None}
    assert "threads" not in facts["placed"]["device"]


def test_pages_and_their_cursor(api: Api) -> None:
    with api.run() as run:
        until(lambda: types(run) == ["placed", "ready"])
        first = run.get("/events", params={"limit": 1}).json()
        assert (first["has_more"], first["ended"], len(first["data"])) == (True, False, 1)
        rest = run.get("/events", params={"after": first["next_after"]}).json()
        assert [event["type"] for event in rest["data"]] == ["ready"]
        assert rest["next_after"] == rest["data"][0]["id"] > first["next_after"]
        nothing = run.get("/events", params={"after": rest["next_after"], "wait": 0.2}).json()
        assert (nothing["data"], nothing["next_after"]) == ([], rest["next_after"])


def test_a_long_poll_is_woken_by_what_happens(api: Api) -> None:
    with api.run() as run:
        after = until(lambda: len(found := run.get("/events").json()["data"]) == 2 and found)[-1][
            "id"
        ]
        timer = threading.Timer(0.4, run.post, ("/cancel",))
        timer.start()
        began = time.monotonic()
        page = run.get("/events", params={"after": after, "wait": 20}).json()
        assert 0.3 < time.monotonic() - began < 5
        timer.join()
        assert [event["type"] for event in page["data"]] == ["closed"]
        assert page["ended"]
        began = time.monotonic()
        query = {"after": page["next_after"], "wait": 20}
        over = run.get("/events", params=query).json()
        assert (over["data"], over["ended"]) == ([], True)
        assert time.monotonic() - began < 5, "nothing can come any more, so nothing is waited for"


def test_operations_do_not_wake_who_waits_for_events(api: Api) -> None:
    with api.run() as run:
        after = until(lambda: len(found := run.get("/events").json()["data"]) == 2 and found)[-1][
            "id"
        ]
        page: list[Any] = []
        query = {"after": after, "wait": 1.5}
        waiting = threading.Thread(
            target=lambda: page.append(run.get("/events", params=query).json())
        )
        waiting.start()
        for _ in range(5):
            run.ok("/forward_backward", BATCH)
        waiting.join()
        assert page[0]["data"] == []


def test_a_stream_sends_what_happens_and_ends_with_the_run(api: Api) -> None:
    events: list[dict[str, str]] = []
    with api.run() as run:
        reader = threading.Thread(target=streamed, args=(run, events))
        reader.start()
        until(lambda: len([event for event in events if "id" in event]) == 2)
        run.ok("/cancel")
        reader.join(10)
        assert not reader.is_alive()
    sent = [event for event in events if "id" in event]
    assert [event["event"] for event in sent] == ["placed", "ready", "closed"]
    ids = [int(event["id"]) for event in sent]
    assert ids == sorted(ids)
    again: list[dict[str, str]] = []
    assert streamed(run, again, last=ids[0]) == 200
    assert [event["event"] for event in again if "id" in event] == ["ready", "closed"]
    assert streamed(run, again, last=ids[-1]) == 204, "a browser then does not come again"


def test_what_a_stream_refuses(api: Api) -> None:
    with api.run() as run:
        for query in ({"wait": 1}, {"limit": 5}):
            answer = run.get("/events", params=query, headers=STREAM)
            assert error_of(answer, 422, "validation_error")["param"] in query
        answer = run.get("/events", headers={**STREAM, "Last-Event-ID": "one"})
        assert error_of(answer, 422, "validation_error")["param"] == "Last-Event-ID"
        error_of(run.get("/events", params={"after": -1}), 422, "validation_error")
    error_of(api.get("/runs/run_0123456789abcdef/events", headers=STREAM), 404, "not_found")


def test_the_sdk_watches_to_the_end(stack: RunningStack) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run("tiny", lora_r=4)
        run.sample("a", max_tokens=1)
        threading.Timer(0.3, run.cancel).start()
        assert [event.type for event in run.watch()] == ["placed", "ready", "closed"]
