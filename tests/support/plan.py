"""A plan of operations whose results all depend on what was done before them, and how often. For tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.api import Api, Run
from tests.support.inside import Inside, until

ROWS = [{"tokens": [(7 * i + 3 * k) % 500 + 5 for k in range(12)]} for i in range(6)]
# The sum of its losses is infinite in float32, which only the worker finds out.
TOO_LARGE = [{"tokens": [5, 6, 7], "weights": [3e38, 3e38, 3e38]}]
ENDLESS: dict[str, Any] = {
    "kind": "sample", "prompts": [[5]] * 8, "n": 8, "max_tokens": 2000, "stop": [],
}  # fmt: skip
PRIMITIVES = ("forward_backward", "optim_step", "sample", "save_state", "complete")
STEPS = 15


def _plan() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(STEPS):
        found.append({"kind": "forward_backward", "batch_data": ROWS[i % 5 : i % 5 + 2]})
        found.append({"kind": "optim_step", "learning_rate": 1e-3 * (i % 3 + 1)})
        if i % 5 == 4:
            found.append({"kind": "sample", "prompts": [[9, 10]], "max_tokens": 6, "stop": []})
    return found


PLAN = _plan()


def futures(run: Run, operations: Sequence[dict[str, Any]]) -> list[str]:
    """Submits operations together; their future ids."""
    answer = run.post("/operations", {"operations": operations})
    assert answer.status_code == 202, answer.text
    return [row["future_id"] for row in answer.json()["data"]]


def ended(api: Api, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The futures, once all have ended."""

    def look() -> list[dict[str, Any]] | None:
        answer = api.get("/futures", params={"ids": ",".join(ids), "wait": 20})
        found: list[dict[str, Any]] = answer.json()["data"]
        over = all(one["status"] in ("completed", "failed", "cancelled") for one in found)
        return found if over else None

    return until(look, 60)


def numbers(future: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in another run of the same operations."""
    assert future["status"] == "completed", future
    kept = ("seq", "step", "loss", "loss_sum", "grad_norm", "token_ids", "weights_step")
    return {name: future["result"][name] for name in kept if name in future["result"]}


def run_plan(api: Api) -> list[dict[str, Any]]:
    """The numbers of the plan in a new run that nobody disturbs."""
    with api.run() as run:
        found = [numbers(one) for one in ended(api, futures(run, PLAN))]
    assert [one["seq"] for one in found] == list(range(1, len(PLAN) + 1))
    assert len({one["loss"] for one in found if "loss" in one}) == STEPS
    return found


def same(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """The numbers of two runs are equal."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            exact = name == "token_ids"
            assert one[name] == (value if exact else pytest.approx(value, rel=1e-6)), (one, other)


def shown_by_flower(api: Api, inside: Inside) -> dict[str, int]:
    """How often Flower lists which primitive, for a run with two forward_backward and one of each other."""
    with api.run() as run:
        sample = {"kind": "sample", "prompts": ["one"], "max_tokens": 2}
        ended(api, futures(run, [PLAN[0], PLAN[0], PLAN[1], sample, {"kind": "save_state"}]))
        run.ok("/complete")

        def shown() -> dict[str, int] | None:
            names = inside.flower_tasks(run.id)
            found = {name: names.count(name) for name in PRIMITIVES}
            return found if sum(found.values()) >= len(PRIMITIVES) + 1 else None

        return until(shown, 20)
