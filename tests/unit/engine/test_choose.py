"""Truncation and drawing as pure functions of logits and a uniform number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workers.engine import choose as chooser
from workers.engine.choose import Settings, choose, choose_rows

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
    # At least half as likely as the likeliest.
    assert _support(min_p=0.5) == [1, 3]
    assert _support(min_p=1.0) == [1]
    # After top_p, which keeps three, and top_k.
    assert _support(min_p=0.3, top_p=0.71) == [1, 3, 4]
    assert _support(min_p=0.7, top_p=0.71) == [1, 3]
    assert _support(min_p=0.1, top_k=1) == [1]
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


def test_rows_have_settings_of_their_own() -> None:
    """One draw for rows of all kinds gives what one for each gives."""
    generator = torch.Generator().manual_seed(3)
    # The vocabulary is no multiple of the runs that are summed.
    logits = 3 * torch.randn(8, 1000, generator=generator)
    uniforms = torch.rand(8, generator=generator, dtype=torch.float64)
    rows = [
        (1.0, -1, 1.0, 0.0, 0),
        (0.0, -1, 1.0, 0.0, 3),
        (0.7, 5, 1.0, 0.0, 0),
        (1.0, -1, 0.6, 0.0, 1),
        (1.3, -1, 1.0, 0.3, 0),
        (2.0, 50, 0.9, 0.1, 2),
        (0.0, 7, 0.5, 0.2, 0),
        (1.0, -1, 1.0, 0.0, 0),
    ]
    together = choose_rows(logits.clone(), uniforms, Settings.of(rows))
    for at, row in enumerate(rows):
        own = choose_rows(logits[at : at + 1].clone(), uniforms[at : at + 1], Settings.of([row]))
        assert (int(own.ids), float(own.logprobs)) == (
            int(together.ids[at]),
            float(together.logprobs[at]),
        )
        assert own.top.get(0) == together.top.get(at)
        assert len(together.top.get(at, ([], []))[0]) == row[4]


def test_many_rows_are_chosen_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniforms = torch.randn(7, 300), torch.rand(7, dtype=torch.float64)
    settings = Settings.of([(1.0, -1, 1.0, 0.0, at % 2) for at in range(7)])
    whole = choose_rows(logits.clone(), uniforms, settings)
    monkeypatch.setattr(chooser, "_CHUNK_ELEMENTS", 900)
    parts = choose_rows(logits.clone(), uniforms, settings)
    assert torch.equal(parts.ids, whole.ids) and torch.equal(parts.logprobs, whole.logprobs)
    assert parts.top == whole.top


def test_logits_that_are_no_numbers_give_a_token_and_no_logprob() -> None:
    for row in ((1.0, -1, 1.0, 0.0, 0), (0.0, -1, 1.0, 0.0, 0), (1.0, 3, 0.5, 0.1, 0)):
        logits = torch.full((2, 300), float("nan"))
        logits[1] = 0.0
        found = choose_rows(
            logits, torch.tensor([0.5, 0.5], dtype=torch.float64), Settings.of([row] * 2)
        )
        assert 0 <= int(found.ids[0]) < 300
        assert not found.logprobs[0].isfinite() and found.logprobs[1].isfinite()


def test_what_sufficed_for_the_last_token_changes_nothing_of_the_next() -> None:
    vocabulary = 3000
    flat = torch.zeros(2, vocabulary) + torch.linspace(0, 0.1, vocabulary)
    # Coarse steps: many tokens of one weight, whose order sorting does not settle.
    steep = (torch.arange(vocabulary) * 7 % vocabulary // 8 / -20.0).repeat(2, 1)
    rows = [(1.0, -1, 0.9, 0.0, 0), (1.0, 1200, 0.95, 0.0, 0)]
    settings = Settings.of(rows)
    for seed, logits in enumerate((steep, flat, steep, flat, flat, steep)):
        uniforms = torch.rand(2, generator=torch.Generator().manual_seed(seed)).double()
        kept = choose_rows(logits.clone(), uniforms, settings)
        fresh = choose_rows(logits.clone(), uniforms, Settings.of(rows))
        assert torch.equal(kept.ids, fresh.ids)
        assert torch.equal(kept.logprobs, fresh.logprobs)
