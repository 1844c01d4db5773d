"""A stack with one message for many operations (`SIGNAL_DOORBELL=coalesced`), on which gaps end soon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import stack as stacks
from tests.support.api import Api, Run, error_of
from tests.support.inside import Inside
from tests.support.plan import PRIMITIVES, ROWS, ended, run_plan, same, shown_by_flower
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def coalesced(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningStack]:
    data_dir = tmp_path_factory.mktemp("coalesced") / "data"
    settings = {"SIGNAL_DOORBELL": "coalesced", "SIGNAL_GAP_DEADLINE": "1"}
    options = ("--model", f"tiny={tiny_model}", "--devices", "cpu:1x1")
    try:
        yield stacks.up(data_dir, *options, env=settings)
    finally:
        stacks.down(data_dir)


@pytest.fixture(scope="module")
def api(coalesced: RunningStack) -> Iterator[Api]:
    found = Api(coalesced)
    yield found
    found.http.close()


@pytest.fixture
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


def test_the_numbers_are_those_of_a_message_per_operation(api: Api, stack: RunningStack) -> None:
    other = Api(stack)
    try:
        same(run_plan(api), run_plan(other))
    finally:
        other.http.close()


def test_flower_shows_every_primitive(api: Api, coalesced: RunningStack) -> None:
    wanted = dict.fromkeys(PRIMITIVES, 1) | {"forward_backward": 2}
    with Inside(coalesced) as inside:
        assert shown_by_flower(api, inside) == wanted


def submit(run: Run, client_seq: int, *, lane: str = "a") -> str:
    """A forward_backward in a lane; its future."""
    body: dict[str, Any] = {"batch_data": ROWS[:2], "lane": lane, "client_seq": client_seq}
    answer = run.post("/forward_backward_async", body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["future_id"])


def test_a_gap_fails_what_waits_behind_it_and_nothing_else(run: Run) -> None:
    first = submit(run, 1)
    behind = [submit(run, 3), submit(run, 5)]
    aside = submit(run, 1, lane="b")
    found = ended(run.api, [first, *behind, aside])
    assert [one["status"] for one in found] == ["completed", "failed", "failed", "completed"]
    for one in found[1:3]:
        assert one["error"]["code"] == "sequence_gap"
        assert one["seq"] is None
    # What should have filled the gap comes too late; the lane goes on after the last that failed.
    late = {"batch_data": ROWS[:2], "lane": "a", "client_seq": 2}
    error_of(run.post("/forward_backward", late), 409, "sequence_gap")
    (after,) = ended(run.api, [submit(run, 6)])
    assert (after["status"], after["seq"]) == ("completed", 3)
    assert run.ok("/optim_step")["step"] == 1


def test_a_gap_that_is_filled_in_time_is_none(run: Run) -> None:
    ids = [submit(run, number) for number in (4, 2, 3, 1)]
    assert [one["seq"] for one in ended(run.api, ids)] == [4, 2, 3, 1]
