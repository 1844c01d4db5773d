"""What holds for every loss: splitting changes nothing, gradients are true, metrics are as declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from schemas.losses import BUILT_IN
from tests.unit.engine.losses.support import (
    DTYPE,
    Padded,
    as_input,
    constants,
    divisor,
    make_padded,
    make_pairs,
)
from workers.engine.losses import DIVISORS, merged, resolve_loss
from workers.engine.losses.form import mean

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BUILT_IN),
    ("dpo", {"label_smoothing": 0.1}),
    ("reward_modeling", {"center_rewards_coefficient": 0.1}),
    ("ppo", {"entropy_coef": 0.1, "vf_coef": 0.5}),
    ("grpo", {"loss_type": "grpo", "beta": 0.1}),
    ("grpo", {"loss_type": "dr_grpo", "max_completion_length": 9}),
    ("grpo", {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": True}),
    ("gspo", {"loss_type": "gspo_token"}),
]
# The gradient of the others is by definition not that of their value.
DIFFERENTIATED = [
    (name, options)
    for name, options in CASES
    if name != "cispo" and options.get("loss_type") != "gspo_token"
]
# Losses that are a pure function of the ratio times the advantage.
ADVANTAGE_ALONE = ("importance_sampling", "ppo", "cispo", "grpo", "gspo")


def batch_for(name: str) -> Padded:
    """Rows with everything that the loss may ask for."""
    spec = BUILT_IN[name]
    if spec.forms == ("preference",):
        pairs = make_pairs()
        pairs.values["margin"] = torch.tensor([0.1, 0.1, 0.0, 0.0, 1.0, 1.0], dtype=DTYPE)
        return pairs
    arrays = ("logprobs", "ref_logprobs", "advantages", "values", "returns")
    padded = make_padded(arrays=arrays, weights=(1.0, 0.5))
    padded.entropy = torch.rand_like(padded.logprobs).requires_grad_()
    padded.values["label"] = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=DTYPE)
    padded.values["reward"] = torch.tensor([1.0, 0, 0.5, 1, 1, 0], dtype=DTYPE)
    return padded


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_splitting_a_batch_changes_nothing(name: str, options: dict[str, Any]) -> None:
    padded, loss = batch_for(name), resolve_loss(name, options)
    shared = {**constants(padded), "kl": 0.3}
    whole = loss(as_input(padded, shared))
    size = 2 if loss.loss.paired else 1
    units = [padded.rows(range(start, start + size)) for start in range(0, 6, size)]
    parts = [loss(as_input(unit, shared)) for unit in reversed(units)]
    total = torch.stack([part.loss_sum for part in parts]).sum()
    assert torch.allclose(whole.loss_sum, total, rtol=1e-12)
    first, second = (
        torch.autograd.grad(one, padded.logprobs, retain_graph=True)[0]
        for one in (whole.loss_sum, total)
    )
    assert torch.allclose(first, second, rtol=1e-12, atol=1e-15)
    expected = merged([whole.metrics])
    found = merged([part.metrics for part in parts])
    assert found.keys() == expected.keys()
    for metric, pair in found.items():
        assert pair == pytest.approx(expected[metric], rel=1e-12)
    assert set(expected) <= set(BUILT_IN[name].metrics)


@pytest.mark.parametrize(("name", "options"), DIFFERENTIATED, ids=str)
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    padded, loss = batch_for(name), resolve_loss(name, options)
    if name in ("grpo", "gspo"):
        # An absolute step must not cross a clip.
        padded.arrays["logprobs"] = padded.logprobs.detach() - 0.01
        loss = resolve_loss(name, {**options, "epsilon": 0.5, "epsilon_high": 0.5})

    def value(logprobs: torch.Tensor) -> torch.Tensor:
        moved = Padded(logprobs, padded.mask, padded.arrays, padded.values, padded.entropy)
        return loss(as_input(moved, {"kl": 0.3})).loss_sum

    assert torch.autograd.gradcheck(value, (padded.logprobs,))


@pytest.mark.parametrize("name", ADVANTAGE_ALONE)
def test_without_an_advantage_nothing_is_computed(name: str) -> None:
    """Also where the ratio would overflow: 0 * infinity is 0 here."""
    padded = batch_for(name)
    padded.arrays["advantages"] = torch.zeros_like(padded.mask)
    padded.arrays["logprobs"] = torch.full_like(padded.mask, -1e4)
    found = resolve_loss(name, {})(as_input(padded)).loss_sum
    assert found.item() == 0.0
    (slope,) = torch.autograd.grad(found, padded.logprobs)
    assert not slope.any()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_two_tables_agree(name: str, options: dict[str, Any]) -> None:
    loss, spec = resolve_loss(name, options), BUILT_IN[name]
    assert loss.name == spec.name
    assert set(loss.options) == {option.name for option in spec.options}
    assert loss.reduction == "sum" or loss.reduction in DIVISORS
    assert loss.loss.paired == (spec.forms == ("preference",))
    assert (loss.loss.statistics is not None) == spec.mismatched
    data = as_input(batch_for(name), {"kl": 0.0})
    assert divisor(loss, data) > 0
    # A loss sees no more than what its rows may give it.
    seen = {"ref_logprobs", *spec.needs, *spec.takes}
    kept = {array: values for array, values in data.arrays.items() if array in seen}
    loss(type(data)(**{**vars(data), "arrays": kept}))


def test_options_are_refused_by_name() -> None:
    with pytest.raises(SignalError) as caught:
        resolve_loss("dpo", {"epsilon": 0.1, "beta": -1, "label_smoothing": True})
    assert [(detail.param, detail.code) for detail in caught.value.details] == [
        ("loss_kwargs.epsilon", "unknown_option"),
        ("loss_kwargs.beta", "validation_error"),
        ("loss_kwargs.label_smoothing", "validation_error"),
    ]


def test_merged_metrics() -> None:
    ones, twos = (
        {"a": mean(torch.ones(3))},
        {"a": mean(torch.full((1,), 2.0)), "b": mean(torch.ones(0))},
    )
    assert merged([ones, twos]) == {"a": (1.25, 4.0)}
    assert merged([]) == {}
