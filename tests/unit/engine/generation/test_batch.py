"""The continuous batch against a forward pass per token; joining and leaving changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.engine.generation.support import (
    PROMPTS,
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
    logprobs_of,
    naive,
)
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base, load_base

SETTINGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.7},
    "top_k": {"top_k": 7, "temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all of them": {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    "copies": {"n": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_draws_what_a_forward_pass_per_token_draws(base: Base, name: str) -> None:
    weights = make_trainer(base).adapter
    request = ask(weights=weights, **SETTINGS[name])
    rows, logprobs = naive(base, request)
    found = alone(base, request)
    assert ids_of(found) == rows
    assert np.abs(logprobs_of(found) - logprobs).max() < 1e-4


def test_requests_of_all_settings_share_a_batch(base: Base) -> None:
    weights = make_trainer(base).adapter
    requests = [
        ask(weights=weights, key=(at, 0), **SETTINGS[name]) for at, name in enumerate(SETTINGS)
    ]
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in requests]
    generator.step()
    assert generator.active == 3 * (len(requests) + 2)
    for request, found in zip(requests, finish(generator, *tickets), strict=True):
        assert ids_of(found) == naive(base, request)[0]


def test_requests_join_and_leave_between_tokens(base: Base) -> None:
    weights = make_trainer(base).adapter
    requests = [
        ask(
            [[4 + at, 9, 30 + at] * (1 + at % 4)],
            key=(at, 5),
            max_tokens=3 + 5 * at % 17,
            weights=weights,
        )
        for at in range(12)
    ]
    generator, tickets = generator_of(base), []
    for request in requests:
        tickets.append(generator.submit(request))
        generator.step()
        generator.step()
    for request, found in zip(requests, finish(generator, *tickets), strict=True):
        expected = alone(base, request)
        assert ids_of(found) == ids_of(expected)
        assert np.abs(logprobs_of(found) - logprobs_of(expected)).max() < 1e-5
    assert (generator.active, generator.waiting) == (0, 0)


def test_a_step_tells_who_has_ended(base: Base) -> None:
    generator = generator_of(base)
    short, long = (generator.submit(ask(max_tokens=tokens)) for tokens in (1, 3))
    assert generator.step() == [short]
    assert short.output is not None and not short.output.cancelled and long.output is None
    assert generator.step() == []
    assert generator.step() == [long]
    assert generator.step() == []


def test_transformers_decoders_take_turns(tiny: Path) -> None:
    base = load_base(tiny, dtype="float32", threads=1, own=False)
    first, second = (make_trainer(base, seed=seed).adapter for seed in (1, 2))
    requests = [
        ask(weights=first, n=2),
        ask(PROMPTS[:1], weights=second, key=(1, 0), max_tokens=5),
        ask(weights=None, temperature=0.0),
    ]
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in requests]
    for request, found in zip(requests, finish(generator, *tickets), strict=True):
        rows, logprobs = naive(base, request)
        assert ids_of(found) == rows
        assert np.abs(logprobs_of(found) - logprobs).max() < 1e-4
