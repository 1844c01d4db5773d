"""dro against Tinker's formula, written by tokens."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.losses.support import check, make_padded


@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
def test_equals_tinker(beta: float) -> None:
    padded = make_padded(arrays=("logprobs", "advantages"), weights=(1.0, 0.5, 0.0))
    terms = []
    for row, column in padded.mask.nonzero().tolist():
        logprob, sampled = padded.logprobs[row, column], padded["logprobs"][row, column]
        gain = logprob * padded["advantages"][row, column] - 0.5 * beta * (logprob - sampled) ** 2
        terms.append(-gain * padded.mask[row, column])
    check("dro", padded, torch.stack(terms).sum(), {"beta": beta})
