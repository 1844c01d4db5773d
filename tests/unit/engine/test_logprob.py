"""Target log-probabilities: value and derivative against autograd on whole logits, in chunks or not."""

from __future__ import annotations

import pytest
import torch

from workers.engine import logprob
from workers.engine.decoder import Head


@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
@pytest.mark.parametrize("shape", ["plain", "biased", "capped"])
def test_equals_log_softmax(chunk: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    weight, bias = torch.randn(17, 6, dtype=torch.float64), torch.randn(17, dtype=torch.float64)
    head = {
        "plain": Head(weight),
        "biased": Head(weight, bias, scale=0.5),
        "capped": Head(weight, None, scale=2.0, softcap=3.0),
    }[shape]
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets, slope = torch.randint(17, (9,)), torch.randn(9, dtype=torch.float64)
    expected = head.logits(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    found = logprob.token_logprobs(hidden, targets, head)
    assert torch.allclose(found, expected, rtol=1e-12)
    first = torch.autograd.grad((found * slope).sum(), hidden)[0]
    second = torch.autograd.grad((expected * slope).sum(), hidden)[0]
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def test_works_without_gradients() -> None:
    head = Head(torch.randn(5, 3))
    assert logprob.token_logprobs(torch.randn(2, 3), torch.tensor([1, 4]), head).shape == (2,)
