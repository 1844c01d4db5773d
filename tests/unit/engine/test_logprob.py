"""Target log-probabilities: value and derivative against autograd on whole logits, in chunks or not."""

from __future__ import annotations

import pytest
import torch

from workers.engine import logprob
from workers.engine.decoder import Head
from workers.engine.linear import LoraLinear, Slot, Term


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


@pytest.mark.parametrize("chunk", [40, 1 << 24])
@pytest.mark.parametrize("capped", [False, True])
def test_many_targets_entropy_and_an_adapter_of_the_head(
    chunk: int, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    weight = torch.randn(17, 6, dtype=torch.float64)
    layer = LoraLinear(weight, None, Slot(), 0)
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(17, 2, dtype=torch.float64)
    layer.slot.terms = [Term(a.requires_grad_(), b.requires_grad_(), 0.7)]
    head = Head(weight, None, scale=1.5, softcap=3.0 if capped else None, layer=layer)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(17, (9, 3))
    slopes, by_entropy = torch.randn(9, 3).double(), torch.randn(9).double()

    logits = 1.5 * hidden @ (weight + 0.7 * b @ a).t()
    whole = (3.0 * torch.tanh(logits / 3.0) if capped else logits).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=whole).entropy()
    expected = (whole.gather(1, targets) * slopes).sum() + (entropy * by_entropy).sum()

    found = logprob.token_stats(hidden, targets, head, entropy=True, top=4)
    assert found.entropy is not None and found.top_logprobs is not None
    assert torch.allclose(found.logprobs, whole.gather(1, targets), rtol=1e-12)
    assert torch.allclose(found.entropy, entropy, rtol=1e-12)
    assert torch.allclose(found.top_logprobs, whole.topk(4).values)
    total = (found.logprobs * slopes).sum() + (found.entropy * by_entropy).sum()
    leaves = (hidden, a, b)
    for one, two in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)


def test_a_single_target_of_a_trained_head_keeps_its_shape() -> None:
    layer = LoraLinear(torch.randn(5, 3), None, Slot(), 0)
    layer.slot.terms = [Term(torch.randn(2, 3), torch.randn(5, 2), 1.0)]
    head = Head(layer.weight.detach(), layer=layer)
    found = logprob.token_logprobs(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), head)
    assert found.shape == (4,)


def test_works_without_gradients() -> None:
    head = Head(torch.randn(5, 3))
    assert logprob.token_logprobs(torch.randn(2, 3), torch.tensor([1, 4]), head).shape == (2,)
