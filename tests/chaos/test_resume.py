"""Uninterrupted = resumed with the optimizer ≠ resumed with the weights alone."""

from __future__ import annotations

from typing import Any

from tests.chaos.course import SEED, forward, step
from tests.chaos.harness import Chaos
from tests.support.api import Run

BEFORE, AFTER = 12, 8
NUMBERS = ("loss", "loss_sum", "grad_norm", "num_tokens", "step", "token_ids", "logprobs")


def steps(first: int, count: int) -> list[dict[str, Any]]:
    """Steps with a sample of its own seed behind each fourth, since a place in the order is not kept."""
    found = []
    for i in range(first, first + count):
        found += [forward(i), step(i)]
        if i % 4 == 3:
            found.append(
                {"kind": "sample", "prompts": [[9 + i]], "max_tokens": 6, "stop": [], "seed": i}
            )
    return found


def numbers(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: one[name] for name in NUMBERS if name in one} for one in results]


def resumed(chaos: Chaos, source: Run, *, optimizer: bool) -> tuple[list[dict[str, Any]], Any]:
    """The second half of the course in a new run that begins from the saved state."""
    origin = {"run_id": source.id, "artifact": "middle", "optimizer": optimizer}
    with chaos.run(init_from=origin) as run:
        results = numbers(chaos.train(run, operations=steps(BEFORE, AFTER)))
        return results, chaos.certificate(run)["sha256"]


def test_three_ways_to_the_same_place(chaos: Chaos) -> None:
    with chaos.run() as run:
        chaos.train(run, operations=steps(0, BEFORE))
        chaos.train(run, operations=[{"kind": "save_state", "name": "middle", "mode": "state"}])
        uninterrupted = numbers(chaos.train(run, operations=steps(BEFORE, AFTER)))
        sha256 = chaos.certificate(run)["sha256"]
        whole = resumed(chaos, run, optimizer=True)
        weights = resumed(chaos, run, optimizer=False)
    assert whole == (uninterrupted, sha256)
    # The same weights give the same first loss; without the moments the first step goes elsewhere.
    assert weights[0][0]["loss"] == uninterrupted[0]["loss"]
    assert weights[0][2]["loss"] != uninterrupted[2]["loss"]
    assert weights[1] != sha256


def test_loaded_into_the_run_itself(chaos: Chaos) -> None:
    """load_state takes a run back to where it was, whatever it has done since."""
    load = {"kind": "load_state", "artifact": "middle"}
    with chaos.run(seed=SEED) as run:
        chaos.train(run, operations=steps(0, BEFORE))
        chaos.train(run, operations=[{"kind": "save_state", "name": "middle", "mode": "state"}])
        first = numbers(chaos.train(run, operations=steps(BEFORE, AFTER)))
        second = numbers(chaos.train(run, operations=[load, *steps(BEFORE, AFTER)]))[1:]
        third = numbers(
            chaos.train(run, operations=[{**load, "optimizer": False}, *steps(BEFORE, AFTER)])
        )[1:]
    assert second == first
    assert third[0]["loss"] == first[0]["loss"]
    assert third[2]["loss"] != first[2]["loss"]
