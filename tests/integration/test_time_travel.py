"""Going back, going elsewhere, and proving it: branches, certificates, replays, moving, saved states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from tests.support.api import BATCH, Api, Run, error_of
from tests.support.inside import until
from tests.support.plan import PLAN, ROWS, ended, futures, numbers, same
from tests.support.stack import RunningStack

STATE = ("sha256", "weights", "moments", "gradients", "step")
FB = {"batch_data": ROWS[:2]}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("time-traveller")) as found:
        yield found


@pytest.fixture(autouse=True)
def no_run_is_left(api: Api) -> Iterator[None]:
    """There are two devices, and branches are runs too."""
    yield
    for run in api.get("/runs", params={"limit": 100}).json()["data"]:
        if run["ended_at"] is None:
            api.post(f"/runs/{run['run_id']}/cancel")


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def certificate(run: Run) -> dict[str, Any]:
    """The hashes of a run's state."""
    answer = run.get("/certificate")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return {name: found[name] for name in STATE}


def step(run: Run, count: int = 1, rate: float = 1e-2) -> None:
    for _ in range(count):
        run.ok("/forward_backward", FB)
        run.ok("/optim_step", {"learning_rate": rate})


def branch(run: Run, body: Any = None, status: int = 201) -> Run:
    answer = run.post("/branch", body)
    assert answer.status_code == status, answer.text
    assert answer.headers["Location"] == f"/runs/{answer.json()['run_id']}"
    return Run(run.api, answer.json()["run_id"])


def test_a_certificate_is_of_the_state_and_changes_nothing(run: Run) -> None:
    fresh = certificate(run)
    assert (fresh["step"], fresh["gradients"]) == (0, None)
    run.ok("/forward_backward", FB)
    accumulated = certificate(run)
    assert accumulated["weights"] == fresh["weights"]
    assert accumulated["gradients"] is not None
    found = run.get("/certificate").json()
    assert {name: found[name] for name in STATE} == accumulated
    assert (found["seq"], found["state_seq"]) == (4, 2)
    assert found["fingerprint"]["deterministic"]
    run.ok("/optim_step")
    stepped = certificate(run)
    assert stepped["step"] == 1
    assert stepped["weights"] != fresh["weights"]
    assert stepped["moments"] != fresh["moments"]


def test_the_same_operations_give_the_same_certificate(api: Api, run: Run) -> None:
    with api.run() as other:
        for one in (run, other):
            ended(api, futures(one, PLAN[:8]))
        assert certificate(run) == certificate(other)


def test_a_completed_run_keeps_its_certificate(api: Api, run: Run) -> None:
    step(run)
    last = certificate(run)
    run.ok("/complete", {"save": False})
    kept = run.get("/certificate")
    assert {name: kept.json()[name] for name in STATE} == last
    assert kept.json()["seq"] == 4
    with api.run() as cancelled:
        step(cancelled)
        cancelled.ok("/cancel")
        error_of(cancelled.get("/certificate"), 410, "history_gone")


def test_a_branch_has_the_exact_state_of_its_place(api: Api, run: Run) -> None:
    known: dict[int, dict[str, Any]] = {}
    for _ in range(3):
        seq = run.ok("/forward_backward", FB)["seq"]
        known[seq] = certificate(run)
        run.ok("/optim_step", {"learning_rate": 1e-2})
    shown = run.get().json()
    assert shown["branchable"] == {"from": 0, "to": 9}
    assert shown["parent"] is None
    for seq in (1, 4, 7):
        made = branch(run, {"at_seq": seq, "name": f"at {seq}", "labels": {"at": str(seq)}})
        body = made.get().json()
        assert body["parent"] == {"run_id": run.id, "seq": seq, "artifact": None}
        assert (body["name"], body["labels"]) == (f"at {seq}", {"at": str(seq)})
        assert body["config"] == shown["config"]
        assert certificate(made) == known[seq]
        made.ok("/cancel")


def test_a_branch_goes_its_own_way(run: Run) -> None:
    step(run, 2)
    made = branch(run, {"weight_decay": 0.5, "learning_rate": 1e-3, "lr_scheduler": "constant"})
    config = made.get().json()["config"]
    assert (config["weight_decay"], config["learning_rate"]) == (0.5, 1e-3)
    made.wait_ready()
    assert certificate(made) == certificate(run)
    step(made)
    step(run)
    others = certificate(run)
    assert certificate(made)["weights"] != others["weights"]
    made.ok("/cancel")
    with_same_settings = branch(run, {"at_seq": 4})
    step(with_same_settings)
    assert certificate(with_same_settings) == others


def test_a_branch_of_a_branch_and_of_an_ended_run(api: Api, run: Run) -> None:
    step(run)
    first = certificate(run)
    child = branch(run)
    child.wait_ready()
    step(child)
    second = certificate(child)
    for one in (run, child):
        one.ok("/complete", {"save": False})
    assert run.get().json()["branchable"] == {"from": 0, "to": 4}
    from_ended = branch(run, {"at_seq": 2})
    assert certificate(from_ended) == first
    grandchild = branch(child)
    assert certificate(grandchild) == second
    beginning = branch(child, {"at_seq": 0})
    from_ended.ok("/cancel")
    assert certificate(beginning) == first, "a branch begins where its parent was, not from nothing"
    for one in (grandchild, beginning):
        one.ok("/cancel")


def test_where_no_branch_can_begin(run: Run) -> None:
    step(run)
    error = error_of(run.post("/branch", {"at_seq": 3}), 422, "validation_error")
    assert error["param"] == "at_seq"
    for body, param in (
        ({"at_seq": -1}, "at_seq"),
        ({"lora_r": 8}, "lora_r"),
        ({"base_model": "tiny"}, "base_model"),
        ({"lr_scheduler": "cosine"}, "total_steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"labels": {"": ""}}, "labels."),
    ):
        assert error_of(run.post("/branch", body), 422, "validation_error")["param"] == param
    with_key = {"Idempotency-Key": "branch-1"}
    made = [run.post("/branch", headers=with_key).json()["run_id"] for _ in range(2)]
    assert made[0] == made[1]
    Run(run.api, made[0]).ok("/cancel")


def test_a_replay_proves_the_run(run: Run) -> None:
    ended(run.api, futures(run, PLAN[:12]))
    expected = certificate(run)
    answer = run.post("/replay")
    assert answer.status_code == 202, answer.text
    future = answer.json()
    assert future["kind"] == "certificate"
    (done,) = ended(run.api, [future["future_id"]])
    assert done["status"] == "completed", done
    assert {name: done["result"][name] for name in STATE} == expected
    replay = Run(run.api, future["run_id"])
    assert replay.get().json()["labels"] == {"signal.replay-of": run.id}
    until(lambda: replay.get().json()["status"] == "completed")
    assert certificate(replay) == expected
    listed = run.api.get("/runs", params={"label": f"signal.replay-of={run.id}"}).json()["data"]
    assert [one["run_id"] for one in listed] == [replay.id]


def test_an_ended_run_can_be_replayed(run: Run) -> None:
    step(run, 2)
    run.ok("/complete", {"save": False})
    (done,) = ended(run.api, [run.post("/replay").json()["future_id"]])
    assert {name: done["result"][name] for name in STATE} == certificate(run)


def test_a_run_moves_to_another_device(api: Api, run: Run) -> None:
    step(run)
    run.ok("/forward_backward", FB)
    before, slot = certificate(run), run.get().json()["device"]["slot"]
    # The runs of the tests before this one let go of the other device in their own time.
    until(lambda: run.post("/migrate").status_code == 200)
    moved = until(
        lambda: (
            (now := run.get().json())["status"] == "ready" and now["device"]["slot"] != slot and now
        )
    )
    assert moved["device"]["slot"] != slot
    assert certificate(run) == before
    expected = ["placed", "ready", "moved", "placed", "rebuilt", "ready"]
    until(
        lambda: [event["type"] for event in run.get("/events").json()["data"]] == expected,
        seconds=5,
    )
    with api.run(dedicated=True):
        error_of(run.post("/migrate"), 409, "no_other_device")
        queued = Run(api, api.create(dedicated=True))
        assert queued.ok("/migrate")["status"] == "queued", "it waits for a device in any case"
        queued.ok("/cancel")
    run.ok("/cancel")
    error_of(run.post("/migrate"), 409, "run_closed")


def test_what_is_queued_moves_along(run: Run) -> None:
    ids = futures(run, PLAN)
    run.post("/migrate").raise_for_status()
    found = [numbers(one) for one in ended(run.api, ids)]
    with run.api.run() as undisturbed:
        expected = [numbers(one) for one in ended(run.api, futures(undisturbed, PLAN))]
    same(found, expected)


def test_going_on_from_a_saved_state_is_as_if_nothing_had_been_between(run: Run) -> None:
    step(run, 2)
    run.ok("/save_state", {"name": "here", "mode": "state"})
    here = certificate(run)
    step(run)
    after = certificate(run)
    loaded = run.ok("/load_state", {"artifact": "here"})
    assert (loaded["step"], loaded["name"], loaded["optimizer"]) == (2, "here", True)
    assert certificate(run) == here
    step(run)
    assert certificate(run) == after
    run.ok("/load_state", {"artifact": "here", "optimizer": False})
    weights_only = certificate(run)
    assert weights_only["weights"] == here["weights"]
    assert weights_only["moments"] != here["moments"]
    step(run)
    assert certificate(run)["weights"] != after["weights"], "without its moments it goes elsewhere"


def test_load_state_is_an_operation_like_the_others(run: Run) -> None:
    step(run)
    run.ok("/save_state", {"name": "one", "mode": "state"})
    one = certificate(run)
    load = {"kind": "load_state", "artifact": "one"}
    fb = {"kind": "forward_backward", **FB}
    found = ended(run.api, futures(run, [fb, {"kind": "optim_step"}, load]))
    assert [future["status"] for future in found] == ["completed"] * 3
    assert certificate(run) == one
    future = run.post("/load_state_async", {"artifact": "one"})
    assert future.status_code == 202
    assert ended(run.api, [future.json()["future_id"]])[0]["result"]["name"] == "one"


def test_what_cannot_be_loaded(api: Api, stack: RunningStack, run: Run) -> None:
    step(run)
    run.ok("/save_state", {"name": "plain"})
    before = certificate(run)
    error = error_of(run.post("/load_state", {"artifact": "plain"}), 422, "state_mismatch")
    assert error["param"] == "optimizer"
    error = error_of(run.post("/load_state", {"artifact": "other"}), 404, "not_found")
    assert error["param"] == "artifact"
    missing = error_of(
        run.post("/load_state", {"artifact": "plain", "run_id": "run_0123456789abcdef"}),
        404,
        "not_found",
    )
    with Api(stack, stack.new_user("someone-else")) as other, other.run() as foreign:
        foreign.ok("/save_state", {"name": "plain"})
        body = {"artifact": "plain", "run_id": foreign.id}
        refused = error_of(run.post("/load_state", body), 404, "not_found")
        assert {**refused, "request_id": ""} == {**missing, "request_id": ""}
        start = {"base_model": "tiny", "lora_r": 4, "init_from": {**body, "optimizer": False}}
        error_of(api.post("/runs", start), 404, "not_found")
    with api.run(lora_r=8) as wider:
        body = {"artifact": "plain", "run_id": run.id, "optimizer": False}
        assert (
            "lora_r" in error_of(wider.post("/load_state", body), 422, "state_mismatch")["message"]
        )
    assert certificate(run) == before


def test_a_run_begins_from_a_saved_state(api: Api, run: Run) -> None:
    step(run, 2)
    run.ok("/save_state", {"name": "base", "mode": "state"})
    saved = certificate(run)
    with api.run(init_from={"run_id": run.id, "artifact": "base"}) as made:
        assert made.get().json()["parent"] == {"run_id": run.id, "seq": 5, "artifact": "base"}
        assert certificate(made) == saved
    start = {"run_id": run.id, "artifact": "base", "optimizer": False}
    with api.run(init_from=start, weight_decay=0.0) as made:
        fresh = certificate(made)
        assert fresh["weights"] == saved["weights"]
        assert (fresh["step"], fresh["moments"] == saved["moments"]) == (0, False)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"lora_r": 8}, "lora_r"),
        ({"lora_alpha": 1.0}, "lora_alpha"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules"),
    ],
)
def test_a_run_that_a_saved_state_does_not_fit_is_refused(
    run: Run, change: dict[str, Any], param: str
) -> None:
    run.ok("/save_state", {"name": "base", "mode": "state"})
    start = {"init_from": {"run_id": run.id, "artifact": "base"}}
    body = {"base_model": "tiny", "lora_r": 4, **start, **change}
    assert error_of(run.api.post("/runs", body), 422, "state_mismatch")["param"] == param


def test_the_sdk_travels(stack: RunningStack) -> None:
    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.create_run("tiny", lora_r=4)
        run.forward_backward(BATCH["batch_data"])
        run.optim_step()
        run.save_state("here", mode="state")
        state = run.certificate()
        branch = run.branch(at_seq=2, learning_rate=1e-3)
        assert branch.info.parent is not None and branch.info.parent.seq == 2
        assert branch.certificate().sha256 == state.sha256
        branch.cancel()
        assert run.replay().result(60).sha256 == state.sha256
        assert run.load_state("here").step == 1
        saved = {"run_id": run.run_id, "artifact": "here"}
        made = client.create_run("tiny", lora_r=4, init_from=saved)
        assert made.certificate().sha256 == state.sha256
        for one in (made, run):
            one.cancel()
