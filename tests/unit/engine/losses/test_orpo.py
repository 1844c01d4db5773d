"""orpo against the paper's equations 4, 6 and 7, in probabilities instead of logarithms."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.losses.support import DTYPE, Padded, check, compute, make_pairs


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_equals_the_paper(beta: float) -> None:
    pairs = make_pairs()
    average = pairs.means(pairs.logprobs)
    probability = average.exp()
    odds = probability / (1 - probability)
    ratio = torch.log(torch.sigmoid(torch.log(odds[0::2] / odds[1::2])))
    expected = (-average[0::2] - beta * ratio).mean()
    metrics = {
        "nll_loss": -average[0::2].mean(),
        "log_odds_ratio": ratio.mean(),
        "log_odds_chosen": torch.log(odds[0::2] / odds[1::2]).mean(),
        "rewards/chosen": beta * average[0::2].mean(),
    }
    check("orpo", pairs, expected, {"beta": beta}, metrics)


@pytest.mark.parametrize("logprob", [-1e-9, -1e-3, -0.7, -40.0, -800.0])
def test_is_accurate_at_both_ends(logprob: float) -> None:
    """Against the derivative of the log odds, 1 / (1 - p), in arithmetic that does not cancel."""
    values = torch.tensor([[logprob], [-1.0]], dtype=DTYPE, requires_grad=True)
    chosen = {"chosen": torch.tensor([1.0, 0.0], dtype=DTYPE)}
    padded = Padded(values, torch.ones(2, 1, dtype=DTYPE), values=chosen)
    found, output = compute("orpo", padded, {})
    (slope,) = torch.autograd.grad(found, values)
    odds = float(output.metrics["log_odds_chosen"].total)
    share = 1 / (1 + torch.tensor(odds, dtype=DTYPE).exp())
    complement = -torch.expm1(torch.tensor(logprob, dtype=DTYPE))
    assert float(slope[0, 0]) == pytest.approx(float(-1 - 0.1 * share / complement), rel=1e-9)
