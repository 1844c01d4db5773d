"""Truncation and drawing as pure functions of logits and a uniform number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.engine.choose import choose

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def _support(**options: float) -> list[int]:
    """Every token that some uniform number leads to."""
    uniforms = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    logits = PROBABILITIES.log().expand(2000, -1)
    settings: dict[str, float] = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, **options}
    ids, _ = choose(logits, uniforms, **settings)  # type: ignore[arg-type]
    return sorted(set(ids.tolist()))


def test_truncation_keeps_the_likeliest() -> None:
    assert _support() == [0, 1, 2, 3, 4]
    assert _support(top_k=2) == [1, 3]
    assert _support(top_k=0) == _support(top_k=99) == [0, 1, 2, 3, 4]
    # The smallest set whose mass reaches top_p.
    assert _support(top_p=0.69) == [1, 3]
    assert _support(top_p=0.71) == [1, 3, 4]
    # Of what top_k left: 0.4 / 0.7 is 0.57.
    assert _support(top_k=2, top_p=0.5) == [1]
    assert _support(top_k=2, top_p=0.6) == [1, 3]


def test_frequencies_are_the_probabilities() -> None:
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = PROBABILITIES.log().expand(10_000, -1)
    ids, logprobs = choose(logits, uniforms, temperature=1.0, top_k=-1, top_p=1.0)
    assert torch.allclose(ids.bincount() / 10_000, PROBABILITIES, atol=2e-4)
    assert torch.allclose(logprobs, PROBABILITIES.log()[ids], atol=1e-6)
    cut, _ = choose(logits, uniforms, temperature=1.0, top_k=-1, top_p=0.8)
    kept = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85
    assert torch.allclose(cut.bincount(minlength=5) / 10_000, kept.float(), atol=2e-4)


def test_a_nucleus_may_be_wider_than_the_first_candidates() -> None:
    flat = torch.zeros(4, 5000)
    uniforms = torch.tensor([0.01, 0.4, 0.9, 0.999], dtype=torch.float64)
    ids, logprobs = choose(flat, uniforms, temperature=1.0, top_k=-1, top_p=0.95)
    assert len(set(ids.tolist())) == 4
    assert torch.allclose(logprobs, torch.full((4,), -math.log(5000)), atol=1e-4)


def test_impossible_tokens_are_never_drawn() -> None:
    logits: Tensor = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([1e-17, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert choose(logits, uniforms, temperature=1.0, top_k=-1, top_p=1.0)[0].tolist() == [1, 1, 1]
    assert choose(logits, uniforms, temperature=1e-40, top_k=2, top_p=0.5)[0].tolist() == [1, 1, 1]
