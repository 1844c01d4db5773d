"""The log-probability of every target beside a loss, and a loss without its gradient."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import gradient, make_row, make_rows, make_trainer, same, state
from workers.engine.base import Base
from workers.engine.trainer import Trainer
from workers.text.rows import Row

Make = Callable[..., Trainer]
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("cross_entropy", {}),
    ("causal_lm", {}),
    ("importance_sampling", {}),
    ("ppo", {"entropy_coef": 0.1}),
    ("gspo", {}),
    ("dro", {}),
]


def policy_rows() -> list[Row]:
    rows = []
    for row in make_rows((7, 3, 12), seed=5):
        numbers = array("f", [-1.0 - 0.1 * at for at in range(len(row))])
        rows.append(
            Row(row.tokens, row.targets, row.weights, {"logprobs": numbers, "advantages": numbers})
        )
    return rows


def wide_row() -> Row:
    row = make_row(4, 9)
    targets = array("i", [t for first in row.targets for t in (first, 7)])
    return Row(row.tokens, targets, array("f", [0.5, 0.0, 0.0, 0.0, 0.2, 0.8, 0.0, 1.0]))


def scores_of(trainer: Trainer, rows: list[Row]) -> list[Any]:
    """By `forward`, with every position wanted."""
    every = [Row(r.tokens, r.targets, array("f", [1.0]) * len(r.weights)) for r in rows]
    return [row["logprobs"] for row in trainer.forward(every)["rows"]]


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_they_are_those_of_forward_and_change_no_number(
    base64: Base, loss: str, options: dict[str, Any]
) -> None:
    rows = policy_rows()
    plain, asked = make_trainer(base64), make_trainer(base64)
    first = plain.forward_backward(rows, loss, options)
    second = asked.forward_backward(rows, loss, options, logprobs=True)
    assert first["rows"] is None
    assert torch.equal(gradient(plain), gradient(asked))
    assert first["loss_sum"] == second["loss_sum"]
    for found, expected in zip(second["rows"], scores_of(plain, rows), strict=True):
        assert found["logprobs"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_a_loss_without_gradient_is_the_same_loss(
    base64: Base, loss: str, options: dict[str, Any]
) -> None:
    trainer, rows = make_trainer(base64), policy_rows()
    before = state(trainer)
    found = trainer.evaluate(rows, loss, options)
    assert same(before, state(trainer)) and trainer.accumulated == 0
    with_gradient = trainer.forward_backward(rows, loss, options, logprobs=True)
    assert found["loss_sum"] == pytest.approx(with_gradient["loss_sum"], rel=1e-9)
    for name, value in with_gradient["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert [row["example"] for row in found["rows"]] == [0, 1, 2]


def test_several_targets_per_position_keep_their_shape(base64: Base) -> None:
    trainer, row = make_trainer(base64), wide_row()
    expected = scores_of(trainer, [row])[0]
    for found in (
        trainer.evaluate([row], "cross_entropy", {}),
        trainer.forward_backward([row], "cross_entropy", {}, logprobs=True),
    ):
        got = found["rows"][0]["logprobs"]
        assert [len(place) for place in got] == [2, 2, 2, 2]
        for place, other in zip(got, expected, strict=True):
            assert place == pytest.approx(other, rel=1e-9)


def test_a_sum_over_nothing_is_0_and_its_rows_are_scored(trainer: Make) -> None:
    run, silent = trainer(), make_row(5, 1, [0.0] * 5)
    for found in (
        run.evaluate([silent], "cross_entropy", {}),
        run.forward_backward([silent], "cross_entropy", {}, logprobs=True),
    ):
        assert found["loss_sum"] == 0
        assert all(value < 0 for value in found["rows"][0]["logprobs"])
    assert not gradient(run).any()


def test_targets_that_are_not_counted_are_checked_where_they_are_scored(trainer: Make) -> None:
    run, row = trainer(), make_row(5, 1, [1.0, 0.0, 1.0, 1.0, 1.0])
    row.targets[1] = 512
    assert run.forward_backward([row], "cross_entropy", {})["num_tokens"] == 4
    for call in (
        lambda: run.forward_backward([row], "cross_entropy", {}, logprobs=True),
        lambda: run.evaluate([row], "cross_entropy", {}),
    ):
        with pytest.raises(SignalError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == (
            "token_out_of_range",
            "batch_data.0.targets",
        )
