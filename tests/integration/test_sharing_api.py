"""Runs that share a device, as their owners see it: through the whole stack of two slots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support import stack as stacks
from tests.support.api import Api, Run, error_of
from tests.support.inside import until
from tests.support.plan import PLAN, ended, futures, numbers, run_plan, same
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("sharing")) as found:
        yield found


def place(run: Run) -> tuple[str, int]:
    found = run.get().json()
    return found["device"]["slot"], found["sharing_with"]


def test_three_runs_on_two_devices(api: Api, stack: RunningStack) -> None:
    expected = run_plan(api)
    with ExitStack() as running:
        first, second = (running.enter_context(api.run()) for _ in range(2))
        until(lambda: {place(first)[0], place(second)[0]} == {"cpu0", "cpu1"})
        assert [place(first)[1], place(second)[1]] == [0, 0]
        third = running.enter_context(api.run())
        runs = (first, second, third)
        assert sorted(place(run)[1] for run in runs) == [0, 1, 1]
        ids = [futures(run, PLAN) for run in runs]
        for own in ids:
            same([numbers(one) for one in ended(api, own)], expected)
        report = json.loads(stacks.signal("status", "--json", "--data-dir", stack.data_dir))
        shown = {run["run_id"]: run["sharing_with"] for run in report["runs"]}
        assert sorted(shown[run.id] for run in runs) == [0, 1, 1]
        third.ok("/cancel")
        until(lambda: [place(first)[1], place(second)[1]] == [0, 0])


def test_a_device_of_its_own(api: Api) -> None:
    with api.run(dedicated=True) as single, api.run():
        assert single.get().json()["config"]["dedicated"] is True
        with api.run() as third:
            assert place(third)[1] == 1
            assert place(third)[0] != place(single)[0]
            waiting = Run(api, api.create(dedicated=True))
            whole = Run(api, api.create(lora_r=0))
            assert [run.get().json()["status"] for run in (waiting, whole)] == ["queued"] * 2
            assert waiting.get().json()["sharing_with"] == 0
            for run in (waiting, whole):
                run.ok("/cancel")


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_dedicated_is_yes_or_no(api: Api, value: object) -> None:
    answer = api.post("/runs", {"base_model": "tiny", "dedicated": value})
    assert error_of(answer, 422, "validation_error")["param"] == "dedicated"
