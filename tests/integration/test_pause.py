"""Standing still and going on: by the owner's word, for idleness, and where the owner must take note."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from tests.support.api import BATCH, Api, Run, error_of
from tests.support.inside import Inside, until
from tests.support.plan import PLAN, ended, futures, numbers, run_plan, same
from tests.support.stack import RunningStack
from tests.support.valkey import settings_for
from workers.queue.journal import Journal
from workers.storage import open_storage


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("pauses")) as found:
        yield found


@pytest.fixture(scope="module")
def inside(stack: RunningStack) -> Iterator[Inside]:
    with Inside(stack) as found:
        yield found


@pytest.fixture(scope="module")
def journal(stack: RunningStack, inside: Inside) -> Journal:
    """The stack's own, for holds that nobody can ask for."""
    settings = settings_for(stack.data_dir, "redis://unused")
    return Journal(inside.redis, open_storage(settings), settings)


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def paused(run: Run) -> dict[str, Any]:
    """The run, once its worker has let go of it."""
    shown: dict[str, Any] = until(lambda: (now := run.get().json())["status"] == "paused" and now)
    return shown


def certificate(run: Run) -> dict[str, Any]:
    answer = run.get("/certificate")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return {name: found[name] for name in ("sha256", "weights", "moments", "gradients", "step")}


def test_a_paused_run_frees_its_device_and_goes_on_as_it_was(run: Run) -> None:
    run.ok("/forward_backward", BATCH)
    run.ok("/optim_step")
    run.ok("/forward_backward", BATCH)
    before = certificate(run)
    first = run.post("/pause").json()
    assert first["status"] in ("pausing", "paused")
    assert first["hold"] == {"reason": "user", "info": {}, "accept": None}
    assert run.ok("/pause")["hold"] == first["hold"], "a second time is no error"
    shown = paused(run)
    assert shown["snapshot"]["seq"] == 4
    listed = until(lambda: run.api.get("/runs", params={"status": "paused"}).json()["data"])
    assert [one["run_id"] for one in listed] == [run.id]
    assert run.get("/session_state").json()["worker"] is None
    resumed = run.ok("/resume")
    assert resumed["hold"] is None
    run.wait_ready()
    assert certificate(run) == before
    assert run.ok("/resume")["status"] == "ready", "what is not held just goes on"


def test_operations_of_a_paused_run_are_refused(run: Run) -> None:
    run.ok("/forward_backward", BATCH)
    run.post("/pause")
    for path, body in (("/forward_backward", BATCH), ("/optim_step_async", {}), ("/complete", {})):
        error = error_of(run.post(path, body), 409, "run_paused")
        assert error["data"] == {"reason": "user"}
        assert not error["retryable"]
    error_of(run.get("/certificate"), 409, "run_paused")
    error_of(run.post("/migrate"), 409, "run_paused")
    paused(run)
    assert run.ok("/complete", {"save": False})["status"] == "completed"
    error_of(run.post("/pause"), 409, "run_closed")
    error_of(run.post("/resume"), 409, "run_closed")


def test_what_is_queued_waits_and_changes_no_number(api: Api) -> None:
    expected = run_plan(api)
    with api.run() as run:
        ids = futures(run, PLAN)
        for _ in range(3):
            run.post("/pause")
            paused(run)
            run.post("/resume")
        same([numbers(one) for one in ended(api, ids)], expected)


def test_a_run_that_waits_for_a_device_is_paused_at_once(api: Api) -> None:
    with api.run(dedicated=True), api.run(dedicated=True):
        third = Run(api, api.create())
        assert third.ok("/pause")["status"] == "paused"
        assert third.ok("/resume")["status"] == "queued"
        third.ok("/cancel")


def test_an_operation_resumes_a_run_that_was_paused_for_idleness(
    run: Run, journal: Journal
) -> None:
    run.ok("/forward_backward", BATCH)
    assert journal.hold(run.id, "paused", {"reason": "idle"})
    assert paused(run)["hold"]["reason"] == "idle"
    assert run.ok("/optim_step")["step"] == 1
    assert run.get().json()["hold"] is None


def test_its_owners_pause_outlasts_that_for_idleness(run: Run, journal: Journal) -> None:
    journal.hold(run.id, "paused", {"reason": "idle"})
    paused(run)
    assert run.ok("/pause")["hold"]["reason"] == "user"
    error_of(run.post("/optim_step"), 409, "run_paused")


@pytest.mark.parametrize(
    ("hold", "info", "code", "accept"),
    [
        ("rolled_back", {"at_seq": 1}, "rolled_back", "rolled_back"),
        ("mismatch", {"seq": 1, "kind": "optim_step"}, "run_paused", "rebuilt"),
    ],
)
def test_its_owner_must_take_note(
    run: Run, journal: Journal, hold: str, info: dict[str, Any], code: str, accept: str
) -> None:
    run.ok("/forward_backward", BATCH)
    assert journal.hold(run.id, hold, info)
    shown = run.get().json()
    assert shown["hold"] == {"reason": hold, "info": info, "accept": accept}
    refused = error_of(run.post("/optim_step"), 409, code)
    first = next(iter(info))
    assert refused["data"][first] == info[first]
    other = {"rebuilt": "rolled_back", "rolled_back": "rebuilt"}[accept]
    for body in ({}, {"accept": None}, {"accept": other}):
        error = error_of(run.post("/resume", body), 409, code)
        assert error["data"] == {**info, **refused["data"], "accept": accept}
    assert error_of(run.post("/resume", {"accept": "it"}), 422, "validation_error")["param"]
    assert run.ok("/pause")["hold"] == shown["hold"], "it stands still already"
    assert run.ok("/resume", {"accept": accept})["hold"] is None
    assert run.ok("/optim_step")["step"] == 1


def test_a_lost_journal_is_waited_for_and_then_taken_note_of(run: Run, inside: Inside) -> None:
    for _ in range(2):
        run.ok("/forward_backward", BATCH)
        run.ok("/optim_step")
    before = certificate(run)
    until(lambda: len(run.get("/metrics").json()["metrics"]) == 4)
    with inside.frozen(run.id):
        inside.redis.delete(*inside.redis.keys(f"*{run.id}*"))
        shown = run.get().json()
        answer = run.post("/optim_step")
    assert shown["status"] in ("rebuilding", "rolled_back")
    if answer.status_code == 503:
        assert int(answer.headers["Retry-After"]) >= 1
        error_of(answer, 503, "unavailable")
    else:
        error_of(answer, 409, "rolled_back")
    shown = until(lambda: (now := run.get().json())["status"] == "rolled_back" and now)
    at_seq = shown["hold"]["info"]["at_seq"]
    assert at_seq == shown["applied_seq"] <= 5
    assert error_of(run.post("/optim_step"), 409, "rolled_back")["data"] == {"at_seq": at_seq}
    run.ok("/resume", {"accept": "rolled_back"})
    run.wait_ready()
    if at_seq >= 4:
        assert certificate(run) == before
    run.ok("/forward_backward", BATCH)
    kinds = until(
        lambda: (
            "rolled_back" in (now := [e["type"] for e in run.get("/events").json()["data"]]) and now
        )
    )
    assert kinds.count("rolled_back") == 1
    seqs = until(
        lambda: len(now := [row["seq"] for row in run.get("/metrics").json()["metrics"]]) and now
    )
    assert seqs == sorted(set(seqs)), "one row per seq"


def test_an_exception_pauses_the_run(stack: RunningStack) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run("tiny", lora_r=4)
        found: list[str] = []
        with pytest.raises(RuntimeError, match="mine"):
            break_in(run, found)
        until(lambda: run.status().status == "paused")
        again = client.run(run.run_id)
        assert again.info.snapshot is not None
        again.resume()
        assert [again.certificate().sha256] == found
        again.cancel()


def break_in(run: rs.SignalRun, found: list[str]) -> None:
    with run:
        run.forward_backward([{"text": "one"}])
        run.optim_step()
        found.append(run.certificate().sha256)
        raise RuntimeError("mine")
