"""Entropy of the next token: value and derivative against autograd on whole logits, in chunks or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from workers.engine import logprob
from workers.engine.decoder import Head


def token_entropy(hidden: Tensor, head: Head) -> Tensor:
    """H [N] in nats."""
    targets = torch.zeros(len(hidden), dtype=torch.long)
    found = logprob.token_stats(hidden, targets, head, entropy=True).entropy
    assert found is not None
    return found


@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
@pytest.mark.parametrize("shape", ["plain", "biased", "capped"])
def test_equals_torch(chunk: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    weight, bias = torch.randn(17, 6, dtype=torch.float64), torch.randn(17, dtype=torch.float64)
    head = {
        "plain": Head(weight),
        "biased": Head(weight, bias, scale=0.5),
        "capped": Head(weight, None, scale=2.0, softcap=3.0),
    }[shape]
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(9, dtype=torch.float64)
    expected = Categorical(logits=head.logits(hidden)).entropy()
    found = token_entropy(hidden, head)
    assert torch.allclose(found, expected, rtol=1e-12)
    first = torch.autograd.grad((found * slope).sum(), hidden)[0]
    second = torch.autograd.grad((expected * slope).sum(), hidden)[0]
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def test_a_certain_token_has_no_entropy() -> None:
    head = Head(torch.tensor([[1e4], [-1e4], [0.0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    found = token_entropy(hidden, head)
    assert found.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(found.sum(), hidden)[0].any()


def test_works_without_gradients() -> None:
    assert token_entropy(torch.randn(2, 3), Head(torch.randn(5, 3))).shape == (2,)
