"""Spans and the slab by themselves, and what 16 bits change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.engine.generation.support import (
    PROMPTS,
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
    logprobs_at,
)
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base, load_base
from workers.engine.linear import LoraLinear, Slot, Term
from workers.engine.slab import Slab
from workers.engine.spans import Span, linear, product, spans_of


@pytest.fixture(scope="module")
def half(tiny: Path) -> Base:
    """The tiny model in bfloat16."""
    return load_base(tiny, dtype="bfloat16", threads=1)


@pytest.mark.parametrize("rows", [1, 2, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_the_same_either_way(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (rows, 80))
    expected = x.double() @ weight.double().t()
    near = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(product(x, weight).double(), expected, atol=10 * near, rtol=near)


@pytest.mark.parametrize("bias", [False, True])
def test_each_span_gets_its_own_term(bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight, x, residual = draw(7, 5), draw(6, 5), draw(6, 7)
    layer = LoraLinear(weight, draw(7) if bias else None, Slot(), 0)
    first = Term(draw(2, 5), draw(7, 2), 0.5)
    second = Term(draw(3, 5), draw(7, 3), 2.0, draw(7), draw(7), draw(7))
    spans = spans_of([1, 1, 2, 1, 1], [[first], None, [second], [None], [None]])
    found = linear(x, layer, spans, residual)
    zero = torch.zeros(7) if layer.bias is None else layer.bias
    for span in spans:
        part, term = x[span.begin : span.end], span.term(layer)
        y = part @ weight.t()
        if isinstance(term, Term):
            y = y + term.scale * part @ term.a.t() @ term.b.t()
            y = y if term.ratio is None else y * term.ratio
        expected = y + zero + residual[span.begin : span.end]
        assert torch.allclose(found[span.begin : span.end], expected, atol=1e-5)


def test_neighbours_of_one_adapter_are_one_span() -> None:
    one, other = [None], [None]
    assert spans_of([1, 2, 1, 3], [one, one, other, None]) == [
        Span(0, 3, one),
        Span(3, 4, other),
        Span(4, 7, None),
    ]


def test_a_slab_keeps_its_rows_through_every_change() -> None:
    slab = Slab([(2, 4), (1, 6)], torch.zeros(0))
    slab.reserve(3, 5, longest=400, room=1200)
    for row in range(3):
        for layer, (heads, size) in enumerate([(2, 4), (1, 6)]):
            filled = torch.full((heads, row + 1, size), float(row + 1))
            slab.write(layer, slice(row, row + 1), 0, filled, -filled)
    slab.lengths = [1, 2, 3]
    slab.reserve(5, 100, longest=400, room=1200)
    assert slab.slots >= 5 and 100 <= slab.capacity <= 400
    slab.arrange([2, 0])
    assert slab.lengths == [3, 1]
    for store in slab.layers:
        assert (store.keys[0, :, :3] == 3).all() and (store.values[1, :, :1] == -1).all()
    slab.clear(0)
    assert not slab.layers[1].keys[0].any()
    slab.arrange([])
    assert (slab.slots, slab.capacity) == (0, 0)


@pytest.mark.parametrize("others", [0, 3])
def test_sixteen_bits_stay_near_the_forward_pass(half: Base, others: int) -> None:
    weights = make_trainer(half).adapter.frozen()
    generator = generator_of(half)
    for seed in range(others):
        beside = make_trainer(half, seed=2 + seed, r=3 + seed).adapter.frozen()
        generator.submit(ask(weights=beside, key=(seed, 4)))
    output = finish(generator, generator.submit(ask(weights=weights, n=2)))[0]
    gaps = []
    for prompt, row in zip(PROMPTS, output.samples, strict=True):
        for sample in row:
            for at, token in enumerate(sample.token_ids):
                logits = logprobs_at(half, weights, prompt + sample.token_ids[:at])
                logits -= logits.max()
                gaps.append(logits[token] - np.log(np.exp(logits).sum()) - sample.logprobs[at])
    assert abs(np.mean(gaps)) < 0.05 and np.abs(gaps).max() < 0.5


def test_deterministic_holds_in_sixteen_bits_too(half: Base) -> None:
    adapters = [make_trainer(half, seed=seed).adapter for seed in range(3)]
    request = ask(weights=adapters[0], deterministic=True, n=3, max_tokens=20)
    expected = alone(half, request)
    generator = generator_of(half)
    others = [generator.submit(ask(weights=one, key=(at, 3))) for at, one in enumerate(adapters)]
    generator.step()
    found = finish(generator, generator.submit(request), *others)
    assert found[0] == expected and len(ids_of(found[0])) == 9
