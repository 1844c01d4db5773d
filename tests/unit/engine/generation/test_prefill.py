"""What prompts share is computed once, and gives what it gives when it is computed for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.unit.engine.generation.support import (
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
    logprobs_of,
    naive,
)
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base
from workers.engine.generation import prefill
from workers.engine.llama import Fresh, Llama
from workers.engine.slab import Slab

COMMON = [7 + at * 5 % 300 for at in range(50)]
PROMPTS = [[*COMMON, 400], [*COMMON, 401, 402, 403], COMMON, [9, 9], COMMON[:40] + [8] * 12]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every pass."""
    tokens: list[int] = []
    fill = Llama.fill

    def counted(self: Llama, fresh: Sequence[Fresh], cache: Slab) -> torch.Tensor:
        tokens.append(sum(len(one.tokens) for one in fresh))
        return fill(self, fresh, cache)

    monkeypatch.setattr(Llama, "fill", counted)
    return tokens


def test_copies_of_a_prompt_are_computed_once(base: Base, computed: list[int]) -> None:
    output = alone(base, ask([COMMON, COMMON], n=8))
    assert computed == [len(COMMON)]
    assert len({tuple(ids) for ids in ids_of(output)}) > 1


def test_a_common_beginning_is_computed_once(base: Base, computed: list[int]) -> None:
    weights = make_trainer(base).adapter
    request = ask(PROMPTS, weights=weights, max_tokens=6)
    output = alone(base, request)
    # The four share 40; the last token of each is always computed.
    assert computed == [40, sum(len(prompt) for prompt in PROMPTS) - 4 * 40]
    rows, logprobs = naive(base, request)
    assert ids_of(output) == rows
    assert np.abs(logprobs_of(output) - logprobs).max() < 1e-4


def test_a_beginning_that_is_there_already_is_used(base: Base, computed: list[int]) -> None:
    first = ask([COMMON + [3] * 9], max_tokens=20)
    later = [ask([[*COMMON, 60 + at]], key=(at, 1), max_tokens=5) for at in range(2)]
    expected = [alone(base, request) for request in (first, *later)]
    computed.clear()
    generator = generator_of(base)
    tickets = [generator.submit(first)]
    generator.step()
    tickets += [generator.submit(request) for request in later]
    found = finish(generator, *tickets)
    assert computed == [len(COMMON) + 9, 2]
    for own, output in zip(expected, found, strict=True):
        assert ids_of(output) == ids_of(own)
        assert np.abs(logprobs_of(output) - logprobs_of(own)).max() < 1e-5


def test_other_adapters_share_nothing(base: Base, computed: list[int]) -> None:
    adapters = [make_trainer(base, seed=seed).adapter for seed in (1, 2)]
    requests = [ask([COMMON], weights=weights) for weights in adapters]
    generator = generator_of(base)
    finish(generator, *[generator.submit(request) for request in requests])
    assert computed == [2 * len(COMMON)]


def test_many_tokens_go_through_in_several_passes(
    base: Base, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask([[5 + at] * (10 + at) for at in range(6)], max_tokens=4, deterministic=True)
    together = alone(base, request)
    computed.clear()
    monkeypatch.setattr(prefill, "MOST_TOKENS", 24)
    assert ids_of(alone(base, request)) == ids_of(together)
    assert computed == [21, 12, 13, 14, 15]


def test_a_long_prompt_goes_through_piece_by_piece(
    base: Base, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask([[9, 8, 7], [*COMMON, *COMMON[::-1]], COMMON], n=2, max_tokens=4)
    whole = alone(base, request)
    computed.clear()
    monkeypatch.setattr(prefill, "MOST_TOKENS", 24)
    pieces = alone(base, request)
    # The 49 that two share; then one token of one, and what is left of the other.
    assert computed == [24, 24, 1, 4, 24, 24, 3]
    assert ids_of(pieces) == ids_of(whole)
    assert np.abs(logprobs_of(pieces) - logprobs_of(whole)).max() < 1e-5
