"""Cancelling, waiting and ending on a real worker: what is queued, what runs, what is left of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.api import Api, Run, error_of
from tests.support.inside import Inside, until
from tests.support.plan import (
    ENDLESS,
    PLAN,
    PRIMITIVES,
    ROWS,
    STEPS,
    ended,
    futures,
    numbers,
    run_plan,
    same,
    shown_by_flower,
)
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    found = Api(stack, stack.new_user("waiting"))
    yield found
    found.http.close()


@pytest.fixture(scope="module")
def inside(stack: RunningStack) -> Iterator[Inside]:
    with Inside(stack) as found:
        yield found


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def status_of(api: Api, future: str) -> str:
    return str(api.get(f"/futures/{future}").json()["status"])


def test_cancelling(run: Run) -> None:
    api = run.api
    fb = {"kind": "forward_backward", "batch_data": ROWS}
    sample, queued, step, last = futures(run, [ENDLESS, fb, {"kind": "optim_step"}, fb])
    until(lambda: status_of(api, sample) == "running")
    assert api.delete(f"/futures/{queued}").json()["status"] == "cancelled"
    assert status_of(api, sample) == "running"
    assert api.delete(f"/futures/{sample}").json()["status"] == "stopping"
    began = time.monotonic()
    found = ended(api, [sample, queued, step, last])
    assert time.monotonic() - began < 5
    statuses = [one["status"] for one in found]
    assert statuses == ["cancelled", "cancelled", "failed", "completed"]
    assert found[0]["error"]["code"] == "cancelled"
    # What was cancelled left no gradients.
    assert found[2]["error"]["code"] == "no_gradients"
    assert api.delete(f"/futures/{queued}").json()["status"] == "cancelled"
    error_of(api.delete(f"/futures/{last}"), 409, "already_running")


def test_what_trains_cannot_be_cancelled(run: Run) -> None:
    long = {"kind": "forward_backward", "batch_data": [{"tokens": [5, 6, 7, 8] * 500}] * 6}
    (future,) = futures(run, [long])
    until(lambda: status_of(run.api, future) == "running")
    error_of(run.api.delete(f"/futures/{future}"), 409, "already_running")
    assert ended(run.api, [future])[0]["status"] == "completed"


def test_one_long_poll_follows_the_journal(run: Run) -> None:
    run.ok("/forward_backward", {"batch_data": ROWS})
    assert run.get("/operations", params={"after_seq": 1, "wait": 0.2}).json()["data"] == []
    timer = threading.Timer(0.5, run.post, ("/optim_step_async",))
    timer.start()
    began = time.monotonic()
    page = run.get("/operations", params={"after_seq": 1, "wait": 20}).json()
    assert 0.4 < time.monotonic() - began < 10
    timer.join()
    assert [(row["seq"], row["kind"]) for row in page["data"]] == [(2, "optim_step")]
    assert (page["next_seq"], page["applied_seq"], page["has_more"]) == (2, 2, False)
    futures(run, PLAN[:6])
    seen, after = [], 2
    while len(seen) < 6:
        query: dict[str, Any] = {"after_seq": after, "wait": 20, "limit": 2}
        page = run.get("/operations", params=query).json()
        assert page["data"]
        seen += page["data"]
        after = page["next_seq"]
    assert [row["seq"] for row in seen] == [3, 4, 5, 6, 7, 8]
    assert seen[0]["tokens"] == 24
    assert all(row["submitted_at"] <= row["started_at"] <= row["finished_at"] for row in seen)


def test_several_futures_in_one_poll(run: Run) -> None:
    sample, behind = futures(run, [ENDLESS, PLAN[0]])
    query = {"ids": f"{behind},{sample}", "wait": 0.3}
    waiting = run.api.get("/futures", params=query).json()["data"]
    assert [one["future_id"] for one in waiting] == [behind, sample]
    assert waiting[0]["status"] == "pending" and waiting[0]["result"] is None
    threading.Timer(0.3, run.api.delete, (f"/futures/{sample}",)).start()
    found = run.api.get("/futures", params={**query, "wait": 20, "until": "any"}).json()["data"]
    assert found[1]["status"] == "cancelled"
    assert ended(run.api, [behind])[0]["result"]["seq"] == 2


def test_a_run_that_ends_leaves_no_queue_and_keeps_its_results(api: Api, inside: Inside) -> None:
    with api.run() as run:
        ids = futures(run, PLAN)
        assert inside.redis.exists(f"_kombu.binding.run.{run.id}") or inside.broker_keys(run.id)
        done = run.ok("/complete", {"name": "last"})
        assert (done["status"], done["artifact"], done["current_step"]) == (
            "completed",
            "last",
            STEPS,
        )
        until(lambda: not inside.broker_keys(run.id))
        same([numbers(one) for one in ended(api, ids)], run_plan(api))
        assert len(run.get("/operations").json()["data"]) == len(PLAN) + 1
        error_of(run.post("/optim_step"), 409, "run_closed")
        until(lambda: inside.redis.ttl(f"sig:{{{run.id}}}:head") > 80_000)
        assert not inside.broker_keys(run.id)


def test_flower_shows_every_primitive(api: Api, inside: Inside) -> None:
    wanted = dict.fromkeys(PRIMITIVES, 1) | {"forward_backward": 2}
    assert shown_by_flower(api, inside) == wanted
