"""The seam between losses and batching: constants, units, references, and statistics."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from workers.engine.counted import counted
from workers.engine.losses import resolve_loss
from workers.engine.objective import Objective
from workers.text.rows import Row

CPU, DTYPE = torch.device("cpu"), torch.float64


def row(weights: list[float], **extra: Any) -> Row:
    count = len(weights)
    return Row(array("i", range(count)), array("i", range(count)), array("f", weights), **extra)


def objective(name: str, rows: list[Row], **options: Any) -> Objective:
    return Objective(resolve_loss(name, options), rows, CPU, DTYPE)


def pair(example: int, **values: float) -> list[Row]:
    return [
        row([0, 1, 1], values={"chosen": chosen, **values}, example=example)
        for chosen in (1.0, 0.0)
    ]


def test_counted_entries_are_in_order() -> None:
    wide = Row(array("i", [1, 2]), array("i", [3, 4, 5, 6]), array("f", [0.5, 0.5, 0, 1]))
    found = counted([row([0, 2, 0, -1]), wide])
    assert found.rows.tolist() == [0, 0, 1, 1, 1]
    assert found.positions.tolist() == [1, 3, 0, 0, 1]
    assert found.targets.tolist() == [1, 3, 3, 4, 6]
    assert found.columns.tolist() == [0, 0, 0, 1, 1]
    assert found.weights.tolist() == [2, -1, 0.5, 0.5, 1]
    rows = [row([0, 1], arrays={"a": array("f", [7, 8])}), row([1], arrays={"a": array("f", [9])})]
    assert counted(rows).array(rows, "a").tolist() == [8, 9]


def test_constants_are_of_the_whole_call() -> None:
    rows = [row([0, 2, 1]), row([1]), row([1, 1], trained=False)]
    found = objective("causal_lm", rows)
    assert found.constants == {"weight": 4, "tokens": 3, "rows": 2, "pairs": 1, "calls": 1}
    assert (found.num_tokens, found.divisor, found.units) == (3, 4, [(0,), (1,)])
    assert objective("cross_entropy", rows).divisor == 1


def test_a_pair_is_a_unit() -> None:
    found = objective("dpo", [*pair(0), *pair(3)])
    assert (found.units, found.divisor) == ([(0, 1), (2, 3)], 2)
    assert found.needs_reference
    assert not objective("dpo", pair(0, ref_logps=-1.0)).needs_reference
    assert not objective("simpo", pair(0)).needs_reference
    for wrong in (pair(0)[:1], pair(0)[::-1], [*pair(0), *pair(0)]):
        with pytest.raises(SignalError):
            objective("dpo", wrong)


def test_a_given_reference_is_not_computed() -> None:
    ref = {"ref_logprobs": array("f", [0, -1]), "advantages": array("f", [0, 1])}
    given = [row([0, 1], arrays=ref)]
    assert not objective("grpo", given, beta=0.1).needs_reference
    bare = [row([0, 1], arrays={"advantages": array("f", [0, 1])})]
    assert objective("grpo", bare, beta=0.1).needs_reference
    assert not objective("grpo", bare).needs_reference


def test_the_reference_goes_with_its_rows() -> None:
    found = objective("dpo", [*pair(0), *pair(1)])
    found.set_reference(torch.arange(8.0))
    part = found.part([2, 3], torch.zeros(4))
    assert part.arrays["ref_logprobs"].tolist() == [4, 5, 6, 7]
    assert part.row_values["chosen"].tolist() == [1, 0]
    assert (part.rows.tolist(), part.row_count) == ([0, 0, 1, 1], 2)


def test_units_may_come_in_any_order() -> None:
    found = objective("dpo", [*pair(0, margin=1.0), *pair(1, margin=2.0)])
    found.set_reference(torch.arange(8.0))
    part = found.part([2, 3, 0, 1], torch.zeros(8))
    assert part.arrays["ref_logprobs"].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert part.row_values["margin"].tolist() == [2, 2, 1, 1]
    assert part.row_values["example"].tolist() == [1, 1, 0, 0]
    assert part.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_reference_that_is_not_finite_names_its_example() -> None:
    found = objective("dpo", [*pair(3), *pair(8)])
    with pytest.raises(SignalError) as caught:
        found.set_reference(torch.tensor([0.0] * 5 + [float("nan")] + [0.0] * 2))
    assert (caught.value.code, caught.value.param) == ("non_finite", "batch_data.8")


def test_statistics_come_of_the_untrained_rows() -> None:
    rows = [row([1, 1], values={"label": 1.0}), row([1, 1], values={"label": 0.0})]
    rows += [row([0, 1], trained=False, example=index) for index in range(2)]
    found = objective("kto", rows)
    assert found.statistic_rows == [2, 3]
    found.set_reference(torch.zeros(6))
    found.set_statistics(torch.tensor([0.5, 1.5]))
    assert found.constants["kl"] == 1.0
    assert objective("causal_lm", rows[:2]).statistic_rows == []


def test_what_rows_lack_is_named() -> None:
    rows = [row([1], arrays={"advantages": array("f", [1])}, example=7)]
    with pytest.raises(SignalError) as caught:
        objective("ppo", rows)
    assert (caught.value.code, caught.value.param) == ("validation_error", "batch_data.7.logprobs")
