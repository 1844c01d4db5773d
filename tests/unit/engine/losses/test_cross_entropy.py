"""cross_entropy: weights of any sign, and distillation from a teacher's distribution."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from tests.unit.engine.losses.support import DTYPE, Padded, check, compute, make_padded


def test_is_a_sum_with_weights_of_any_sign() -> None:
    padded = make_padded(weights=(1.0, -2.0, 0.5, 0.0))
    check("cross_entropy", padded, -torch.einsum("bt,bt->", padded.logprobs, padded.mask))


def test_a_teachers_distribution_as_weights() -> None:
    """All V tokens as targets with their probabilities: torch's cross-entropy with soft labels."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 9, generator=generator, dtype=DTYPE, requires_grad=True)
    teacher = torch.randn(6, 9, generator=generator, dtype=DTYPE).softmax(-1)
    expected = cross_entropy(logits, teacher, reduction="sum")
    found, _ = compute("cross_entropy", Padded(logits.log_softmax(-1), teacher), {})
    ours, theirs = (torch.autograd.grad(one, logits)[0] for one in (found, expected))
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)
