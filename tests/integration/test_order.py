"""Order and exactly-once effect on a real worker, whatever becomes of its doorbells and of requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.api import Api, Run, error_of
from tests.support.inside import Inside
from tests.support.plan import PLAN, ROWS, STEPS, TOO_LARGE, ended, futures, numbers, run_plan, same
from tests.support.stack import RunningStack

Messages = list[bytes]
GOOD: dict[str, Any] = {"kind": "forward_backward", "batch_data": ROWS[:2]}
BAD: dict[str, Any] = {"kind": "forward_backward", "batch_data": TOO_LARGE}
STEP: dict[str, Any] = {"kind": "optim_step"}


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    found = Api(stack, stack.new_user("order"))
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


@pytest.fixture(scope="module")
def undisturbed(api: Api) -> list[dict[str, Any]]:
    """The numbers of the plan when nobody interferes."""
    return run_plan(api)


def shuffled(messages: Messages) -> Messages:
    return random.Random(1).sample(messages, len(messages))


def doubled(messages: Messages) -> Messages:
    return shuffled([*messages, *messages, *messages])


def dropped(messages: Messages) -> Messages:
    return [message for i, message in enumerate(messages) if i % 3 == 1]


def all_dropped(messages: Messages) -> Messages:
    return []


@pytest.mark.parametrize("change", [shuffled, doubled, dropped, all_dropped])
def test_doorbells_change_nothing(
    run: Run,
    inside: Inside,
    undisturbed: list[dict[str, Any]],
    change: Callable[[Messages], Messages],
) -> None:
    with inside.frozen(run.id):
        ids = futures(run, PLAN)
        assert inside.rewrite_queue(run.id, change) >= len(PLAN) - 2
    same([numbers(one) for one in ended(run.api, ids)], undisturbed)
    rows = run.get("/operations").json()["data"]
    assert [row["seq"] for row in rows] == list(range(1, len(PLAN) + 1))
    assert {row["status"] for row in rows} == {"completed"}
    assert run.get("/session_state").json()["current_step"] == STEPS


def test_doorbells_change_nothing_while_the_worker_runs(
    run: Run, inside: Inside, undisturbed: list[dict[str, Any]]
) -> None:
    """Messages vanish, double and change places at every moment, stale ones among them."""
    over, chance, stale = threading.Event(), random.Random(2), []

    def tamper(messages: Messages) -> Messages:
        stale.extend(messages)
        kept = [message for message in messages if chance.random() < 0.6]
        kept += [chance.choice(stale) for _ in range(3) if stale]
        return chance.sample(kept, len(kept))

    def tampering() -> None:
        while not over.wait(0.004):
            inside.rewrite_queue(run.id, tamper)

    thread = threading.Thread(target=tampering)
    thread.start()
    try:
        ids = [one for i in range(0, len(PLAN), 3) for one in futures(run, PLAN[i : i + 3])]
        found = ended(run.api, ids)
    finally:
        over.set()
        thread.join()
    same([numbers(one) for one in found], undisturbed)
    assert stale


def test_lanes_arrive_in_any_order(run: Run, undisturbed: list[dict[str, Any]]) -> None:
    named = [
        {**operation, "lane": "a", "client_seq": number} for number, operation in enumerate(PLAN, 1)
    ]
    first, rest = named[0], named[1:]
    ids: dict[int, str] = {}
    for body in [*random.Random(4).sample(rest, len(rest)), first]:
        sent = {name: value for name, value in body.items() if name != "kind"}
        answer = run.post(f"/{body['kind']}_async", sent)
        assert answer.status_code == 202, answer.text
        ids[body["client_seq"]] = answer.json()["future_id"]
        # Nothing begins before the first of the lane is there.
        assert (answer.json()["seq"] is None) == (body is not first)
    same(
        [numbers(one) for one in ended(run.api, [ids[i] for i in sorted(ids)])],
        undisturbed,
    )
    again = {name: value for name, value in first.items() if name != "kind"}
    answer = run.post("/forward_backward_async", again)
    assert answer.json()["future_id"] == ids[1]
    other = {**again, "batch_data": ROWS[3:]}
    error_of(run.post("/forward_backward_async", other), 409, "client_seq_conflict")


def test_a_failed_forward_backward_dooms_the_step_behind_it(run: Run) -> None:
    found = ended(run.api, futures(run, [GOOD, BAD, STEP, GOOD, STEP]))
    codes = [one["error"]["code"] if one["error"] else None for one in found]
    assert codes == [None, "non_finite", "predecessor_failed", None, None]
    assert [one["status"] for one in found].count("failed") == 2
    # The half batch was discarded with the step.
    assert found[4]["result"]["step"] == 1
    assert found[4]["result"]["grad_norm"] == pytest.approx(found[0]["result"]["grad_norm"])
    assert found[3]["result"]["loss"] == found[0]["result"]["loss"]


def test_a_step_may_go_on_in_spite_of_a_failure(run: Run) -> None:
    found = ended(run.api, futures(run, [GOOD, BAD, {**STEP, "on_error": "continue"}]))
    assert [one["status"] for one in found] == ["completed", "failed", "completed"]
    assert found[2]["result"]["grad_norm"] == pytest.approx(found[0]["result"]["grad_norm"])
    # One that was submitted in knowledge of the failure needs no leave.
    run.ok("/forward_backward", {"batch_data": ROWS[:2]})
    error_of(run.post("/forward_backward", {"batch_data": TOO_LARGE}), 422, "non_finite")
    assert run.ok("/optim_step")["step"] == 2
