"""dpo against the formula as TRL's trainer writes it: padded sums, chunks of chosen and rejected."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from tests.unit.engine.losses.support import check, compute, make_pairs


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equals_trl(beta: float, smoothing: float) -> None:
    pairs = make_pairs()
    logps, reference = pairs.sums(pairs.logprobs), pairs.sums(pairs["ref_logprobs"])
    ratios = logps - reference
    delta = beta * (ratios[0::2] - ratios[1::2])
    losses = -logsigmoid(delta) * (1 - smoothing) - logsigmoid(-delta) * smoothing
    rewards = beta * ratios.detach()
    metrics = {
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": (rewards[0::2] - rewards[1::2]).mean(),
        "rewards/accuracies": (rewards[0::2] > rewards[1::2]).double().mean(),
        "logps/chosen": logps[0::2].mean(),
        "logps/rejected": logps[1::2].mean(),
    }
    options = {"beta": beta, "label_smoothing": smoothing}
    check("dpo", pairs, losses.mean(), options, metrics)


def test_is_logistic_regression_on_the_margin() -> None:
    """Written otherwise: the binary cross-entropy of the margin with the smoothed label."""
    pairs = make_pairs(seed=4)
    ratios = pairs.sums(pairs.logprobs - pairs["ref_logprobs"])
    margins = 0.5 * ratios.view(-1, 2).diff(dim=1).neg().squeeze(1)
    labels = torch.full_like(margins, 1 - 0.2)
    expected = binary_cross_entropy_with_logits(margins, labels)
    check("dpo", pairs, expected, {"beta": 0.5, "label_smoothing": 0.2})


def test_the_reference_may_come_as_one_number_per_response() -> None:
    pairs = make_pairs()
    expected, _ = compute("dpo", pairs, {})
    pairs.values["ref_logps"] = pairs.sums(pairs.arrays.pop("ref_logprobs"))
    found, _ = compute("dpo", pairs, {})
    assert torch.allclose(found, expected, rtol=1e-12)


def test_where_nothing_is_learnt_it_is_log_2() -> None:
    pairs = make_pairs()
    pairs.arrays["ref_logprobs"] = pairs.logprobs.detach()
    found, _ = compute("dpo", pairs, {"beta": 0.7})
    assert found.item() == pytest.approx(0.6931471805599453)
