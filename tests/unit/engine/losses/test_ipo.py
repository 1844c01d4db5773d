"""ipo against the formula as TRL's trainer writes it."""

from __future__ import annotations

import pytest

from tests.unit.engine.losses.support import check, make_pairs


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_equals_trl(beta: float) -> None:
    pairs = make_pairs()
    tokens = (pairs.mask != 0).sum(-1)
    scores = (pairs.logprobs * pairs.mask).sum(1) - (pairs["ref_logprobs"] * pairs.mask).sum(1)
    average = scores / tokens
    delta = average[0::2] - average[1::2]
    expected = ((delta - 1 / (2 * beta)) ** 2).mean()
    check("ipo", pairs, expected, {"beta": beta}, {"rewards/chosen": beta * scores[0::2].mean()})
