"""Adapters of every kind in one batch: each row gets its own, bit for bit where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    logprobs_of,
)
from tests.unit.engine.support import make_rows, make_trainer, same, state
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.generation import Request
from workers.engine.lora import Adapter, LoraSpec
from workers.engine.parameters import Weights
from workers.engine.spans import Stacked
from workers.engine.stack import Stack
from workers.engine.trainer import Trainer

KINDS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 9, "alpha": 3.0},
    {"r": 2, "target_modules": ("q_proj", "down_proj")},
    {"r": 4, "dora": True},
    {"r": 3, "train_unembed": True},
    {"r": 3, "target_modules": ("lm_head",)},
    {"r": 4, "rank_pattern": {"up_proj": 6}, "rslora": True},
]


def _adapter(base: Base, seed: int, options: dict[str, Any]) -> Adapter:
    run = Trainer(base, LoraSpec(**{"alpha": 8.0, "seed": seed, **options}), AdamWSettings(1e-2))
    master = run.adapter.master
    noise = torch.randn(master.shape, generator=torch.Generator().manual_seed(seed))
    master += (0.05 * noise).to(master)
    run.adapter.renew()
    assert isinstance(run.adapter, Adapter)
    return run.adapter


def _requests(base: Base, **options: Any) -> list[Request]:
    adapters: list[Weights | None] = [None]
    adapters += [_adapter(base, seed, kind) for seed, kind in enumerate(KINDS)]
    return [
        ask(weights=weights, key=(at, 0), max_tokens=6 + at, **options)
        for at, weights in enumerate(adapters)
    ]


@pytest.mark.parametrize("which", ["all, as they are", "all, frozen", "stacked"])
def test_mixed_adapters_equal_each_alone(
    base: Base, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, generator = _requests(base), generator_of(base)
    if which != "all, as they are":
        requests = [_frozen(request) for request in requests]
    if which == "stacked":
        # DoRA cannot be.
        requests.pop(1 + next(at for at, kind in enumerate(KINDS) if "dora" in kind))
    sizes, terms = [], Stack.terms

    def counted(self: Stack, owners: Sequence[int]) -> list[Stacked | None]:
        sizes.append(len(self.adapters))
        return terms(self, owners)

    monkeypatch.setattr(Stack, "terms", counted)
    tickets = []
    for request in requests:
        tickets.append(generator.submit(request))
        generator.step()
    for request, found in zip(requests, finish(generator, *tickets), strict=True):
        expected = alone(base, request)
        assert ids_of(found) == ids_of(expected)
        assert np.abs(logprobs_of(found) - logprobs_of(expected)).max() < 1e-5
    assert which != "stacked" or max(sizes) == 6
    assert which != "all, as they are" or not sizes


def _frozen(request: Request) -> Request:
    return replace(request, weights=request.weights and request.weights.frozen())


def test_deterministic_requests_are_bit_for_bit_what_they_are_alone(base: Base) -> None:
    requests = _requests(base, deterministic=True, n=2)
    beside = [ask(key=(50 + at, 0), max_tokens=40, n=3) for at in range(3)]
    generator, tickets = generator_of(base), []
    others = [generator.submit(request) for request in beside]
    for request in requests:
        generator.step()
        tickets.append(generator.submit(request))
    found = finish(generator, *tickets, *others)
    for request, output in zip(requests, found, strict=False):
        assert output == alone(base, request)


def test_deterministic_waves_do_not_depend_on_who_takes_room(base: Base) -> None:
    request = ask(n=4, deterministic=True)
    outputs = []
    for neighbours in (0, 3):
        generator = generator_of(base, positions=120)
        others = [generator.submit(ask(PROMPTS[:1], key=(at, 9))) for at in range(neighbours)]
        generator.step()
        outputs.append(finish(generator, generator.submit(request), *others)[0])
    assert outputs[0] == outputs[1]


def test_training_between_steps_changes_nothing_for_a_ticket_in_flight(base: Base) -> None:
    trained, untouched = make_trainer(base), make_trainer(base)
    rows = make_rows((9, 14), seed=5)
    expected = alone(base, ask(weights=untouched.adapter))
    generator = generator_of(base)
    ticket = generator.submit(ask(weights=trained.adapter.frozen(), deterministic=True))
    while not ticket.done:
        generator.step()
        trained.forward_backward(rows, "cross_entropy", {})
        trained.optim_step()
    assert ticket.output == expected
    # And sampling has left no trace in what was trained.
    for _ in range(trained.step):
        untouched.forward_backward(rows, "cross_entropy", {})
        untouched.optim_step()
    assert same(state(trained), state(untouched))
    later = alone(base, ask(weights=trained.adapter))
    assert ids_of(later) != ids_of(expected)


def test_a_run_of_all_parameters_goes_on_while_its_ticket_is_sampled(tiny: Path) -> None:
    def fresh() -> Trainer:
        base = load_base(tiny, dtype="float32", threads=1, own=False)
        return Trainer(base, LoraSpec(r=0), AdamWSettings(1e-2))

    trained, untouched = fresh(), fresh()
    rows = make_rows((9, 14), seed=5)
    expected = alone(untouched.base, ask(weights=untouched.adapter))
    generator = generator_of(trained.base)
    ticket = generator.submit(ask(weights=trained.adapter.frozen()))
    while not ticket.done:
        generator.step()
        trained.forward_backward(rows, "cross_entropy", {})
        trained.optim_step()
    assert ticket.output == expected
    for _ in range(trained.step):
        untouched.forward_backward(rows, "cross_entropy", {})
        untouched.optim_step()
    assert same(state(trained), state(untouched))


@pytest.mark.parametrize("kind", [0, 3])
def test_a_frozen_copy_is_shared_until_something_changes(base: Base, kind: int) -> None:
    adapter = _adapter(base, 1, KINDS[kind])
    first = adapter.frozen()
    assert adapter.frozen() is first and first.frozen() is first
    before = alone(base, ask(weights=adapter))
    assert alone(base, ask(weights=first)) == before
    adapter.master += 0.1
    adapter.renew()
    assert adapter.frozen() is not first
    assert alone(base, ask(weights=first)) == before
    assert alone(base, ask(weights=adapter)) != before


def test_a_stack_takes_adapters_into_the_places_of_others(base: Base) -> None:
    first, second, third = (
        _adapter(base, seed, {"r": rank}).frozen().terms for seed, rank in enumerate((4, 9, 4))
    )
    assert first is not None and second is not None and third is not None
    stack, memory = Stack([first, second]), Stack([third, second])
    assert not stack.take([first, third])
    assert stack.take([second, third])
    assert [id(one) for one in stack.adapters] == [id(third), id(second)]
    owners = torch.tensor([1, -1, 0])
    for found, expected in zip(stack.terms(owners), memory.terms(owners), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
