"""simpo against the formula as TRL's CPOTrainer writes it: the margin inside, over beta."""

from __future__ import annotations

import pytest
from torch.nn.functional import logsigmoid

from tests.unit.engine.losses.support import check, make_pairs


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.5), (2.0, 1.6), (2.5, -0.1)])
def test_equals_trl(beta: float, gamma: float) -> None:
    pairs = make_pairs()
    average = (pairs.logprobs * pairs.mask).sum(-1) / pairs.mask.sum(-1)
    logits = average[0::2] - average[1::2] - gamma / beta
    expected = -logsigmoid(beta * logits).mean()
    options = {"beta": beta, "simpo_gamma": gamma}
    check("simpo", pairs, expected, options, {"rewards/rejected": beta * average[1::2].mean()})
