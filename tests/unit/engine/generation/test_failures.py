"""What fails for one request ends that request alone; what cannot be done is refused by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.generation.support import (
    PROMPTS,
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
    logprobs_of,
)
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base
from workers.engine.generation import Ticket, scoring
from workers.engine.generation.lane import SlabLane
from workers.engine.generation.ticket import Row


def _broken(base: Base, name: str) -> Any:
    adapter = make_trainer(base, seed=9).adapter
    chosen = next(tensor for path, tensor in adapter.tensors().items() if name in path)
    chosen.fill_(float("nan"))
    adapter.renew()
    return adapter


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.v_proj.lora_B", "layers.1.mlp.down_proj.lora_B"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_numbers_that_are_not_finite_stay_with_their_adapter(
    base: Base, name: str, frozen: bool
) -> None:
    kinds: list[Any] = [make_trainer(base, seed=seed).adapter for seed in (1, 2)]
    broken = _broken(base, name)
    if frozen:
        kinds, broken = [one.frozen() for one in kinds], broken.frozen()
    good = kinds[0]
    beside = [
        ask(PROMPTS[1:2], weights=kinds[at % 2], key=(at, 0), max_tokens=4 + at) for at in range(4)
    ]
    generator = generator_of(base)
    tickets = [generator.submit(beside[0]), generator.submit(beside[1])]
    generator.step()
    # Long, so that its slots reach beyond those of whoever takes them next.
    bad = generator.submit(ask([[9] * 40], weights=broken, n=2))
    assert generator.step() == [bad]
    assert bad.error is not None and bad.error.code == "non_finite" and bad.output is None
    tickets += [generator.submit(request) for request in beside[2:]]
    long = generator.submit(ask([[11] * 60], weights=good, max_tokens=3))
    for request, found in zip(beside, finish(generator, *tickets, long), strict=False):
        expected = alone(base, request)
        assert ids_of(found) == ids_of(expected)
        assert np.abs(logprobs_of(found) - logprobs_of(expected)).max() < 1e-5


def test_scores_that_are_not_finite_name_their_prompt(base: Base) -> None:
    weights = _broken(base, "layers.0.self_attn.v_proj.lora_B")
    generator = generator_of(base)
    bad = generator.submit(ask([[5], [5, 6]], weights=weights, prompt_logprobs=True))
    good = generator.submit(ask())
    assert generator.step() == [bad]
    assert bad.error is not None
    assert (bad.error.code, bad.error.param) == ("non_finite", "prompts.1")
    finish(generator, good)


def test_a_listener_that_raises_ends_its_request_alone(base: Base) -> None:
    def listen(row: int, token: int, logprob: float, text: str | None) -> None:
        raise KeyError("nobody there")

    generator = generator_of(base)
    bad, good = generator.submit(ask(on_token=listen)), generator.submit(ask())
    assert generator.step() == [bad]
    assert bad.error is not None and bad.error.code == "operation_failed"
    assert "nobody there" in bad.error.message
    assert ids_of(finish(generator, good)[0]) == ids_of(alone(base, ask()))


def test_a_listener_may_cancel(base: Base) -> None:
    generator = generator_of(base)
    tickets: list[Ticket] = []

    def listen(row: int, token: int, logprob: float, text: str | None) -> None:
        if row == 1:
            generator.cancel(tickets[0])

    tickets.append(generator.submit(ask(on_token=listen)))
    other = generator.submit(ask(key=(3, 3)))
    generator.step()
    output = tickets[0].output
    assert output is not None and output.cancelled and output.num_tokens == 2
    assert generator.active == 3
    assert ids_of(finish(generator, other)[0]) == ids_of(alone(base, other.request))


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"prompts": []}, "validation_error", "prompts"),
        ({"prompts": [[5], []]}, "validation_error", "prompts.1"),
        ({"prompts": [[5] * 2048]}, "sequence_too_long", "prompts.0"),
        ({"prompts": [[5], [512]]}, "token_out_of_range", "prompts.1"),
        ({"n": 0}, "validation_error", "n"),
        ({"temperature": -0.1}, "validation_error", "temperature"),
        ({"temperature": float("nan")}, "validation_error", "temperature"),
        ({"top_p": 0.0}, "validation_error", "top_p"),
        ({"min_p": 1.5}, "validation_error", "min_p"),
        ({"max_tokens": 0}, "validation_error", "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "validation_error", "max_tokens"),
        ({"top_logprobs": -1}, "validation_error", "top_logprobs"),
        ({"prompt_top_logprobs": 2}, "validation_error", "prompt_top_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(
    base: Base, options: dict[str, Any], code: str, param: str
) -> None:
    generator = generator_of(base)
    with pytest.raises(SignalError) as caught:
        generator.submit(ask(**options))
    assert (caught.value.code, caught.value.param) == (code, param)
    assert generator.waiting == 0


def test_a_base_that_was_taken_over_is_no_bare_base(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "bare", False)
    with pytest.raises(SignalError) as caught:
        generator_of(base).submit(ask())
    assert (caught.value.code, caught.value.param) == ("not_supported", "weights")


def test_an_error_of_the_engine_itself_is_not_hidden(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(n=2), ask(key=(1, 0), deterministic=True), ask(key=(2, 0))]
    expected = [alone(base, request) for request in requests]
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in requests]
    generator.step()
    joining = generator.submit(ask())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "searchsorted", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generator.step()
    # What can go on goes on.
    assert tickets[1].error is not None and tickets[1].error.code == "operation_failed"
    found = finish(generator, tickets[0], tickets[2], joining)
    assert ids_of(found[0]) == ids_of(expected[0]) and ids_of(found[1]) == ids_of(expected[2])


def test_an_error_of_a_lane_of_its_own_ends_its_request(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = SlabLane.keep

    def broken(self: SlabLane, rows: Sequence[Row]) -> None:
        if any(row.ticket.request.deterministic for row in rows):
            raise ZeroDivisionError("broken")
        keep(self, rows)

    generator = generator_of(base)
    bad, good = generator.submit(ask(deterministic=True)), generator.submit(ask())
    with monkeypatch.context() as patched:
        patched.setattr(SlabLane, "keep", broken)
        assert generator.step() == [bad]
    assert bad.error is not None and bad.error.code == "operation_failed"
    assert ids_of(finish(generator, good)[0]) == ids_of(alone(base, ask()))


def test_an_error_while_scoring_ends_its_request(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "token_stats", lambda *args, **options: 1 / 0)
    generator = generator_of(base)
    bad, good = generator.submit(ask(prompt_logprobs=True)), generator.submit(ask())
    assert generator.step() == [bad]
    assert bad.error is not None and bad.error.code == "operation_failed"
    finish(generator, good)
