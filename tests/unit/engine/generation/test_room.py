"""Room for keys and values: who waits, in which order, in how many waves; what is freed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.unit.engine.generation.support import (
    PROMPTS,
    alone,
    ask,
    finish,
    generator_of,
    ids_of,
)
from workers.engine.base import Base
from workers.engine.generation import Generator
from workers.engine.llama import Fresh, Llama
from workers.engine.slab import Slab


def _slab(generator: Generator) -> Slab:
    shared = generator._admission._shared
    assert shared is not None
    return shared._slab


def test_requests_wait_in_the_order_of_their_arrival(base: Base) -> None:
    # Each needs 5 + 12 positions: two have room.
    generator = generator_of(base, positions=40)
    tickets = [generator.submit(ask(PROMPTS[:1], key=(at, 0), max_tokens=12)) for at in range(5)]
    assert [ticket.position for ticket in tickets] == [1, 2, 3, 4, 5]
    generator.step()
    assert [ticket.position for ticket in tickets] == [0, 0, 1, 2, 3]
    assert (generator.active, generator.waiting) == (2, 3)
    ended = []
    while generator.active or generator.waiting:
        ended += generator.step()
    assert ended == tickets
    assert all(ticket.position == 0 for ticket in tickets)


def test_a_large_request_goes_in_waves_and_no_later_one_passes_it(base: Base) -> None:
    generator = generator_of(base, positions=70)
    large = generator.submit(ask(n=4))
    small = generator.submit(ask(PROMPTS[1:2], max_tokens=1, key=(1, 0)))
    generator.step()
    assert generator.active == 4 and small.position == 2 and large.position == 0
    found = finish(generator, large, small)
    assert ids_of(found[0]) == ids_of(alone(base, large.request))


def test_one_row_always_fits(base: Base) -> None:
    generator = generator_of(base, positions=1)
    first, second = (generator.submit(ask(key=(at, 0))) for at in range(2))
    generator.step()
    assert generator.active == 1
    assert ids_of(finish(generator, first, second)[0]) == ids_of(alone(base, first.request))


def test_the_slab_stays_within_its_room_and_is_freed(base: Base) -> None:
    generator, room = generator_of(base, positions=600), 600
    tickets = [
        generator.submit(
            ask([[5 + at] * (1 + 7 * at % 50)], key=(at, 0), max_tokens=1 + 11 * at % 60)
        )
        for at in range(30)
    ]
    while not all(ticket.done for ticket in tickets):
        generator.step()
        slab = _slab(generator)
        assert slab.slots * slab.capacity <= room
        assert all(len(layer.keys) == slab.slots for layer in slab.layers)
    assert _slab(generator).slots == 0


def test_a_cancelled_request_gives_its_room_to_the_next(base: Base) -> None:
    generator = generator_of(base, positions=20)
    first, second, third = (generator.submit(ask(PROMPTS[:1], key=(at, 0))) for at in range(3))
    generator.step()
    generator.step()
    generator.cancel(second)
    generator.cancel(first)
    assert first.output is not None and first.output.cancelled and first.output.num_tokens == 2
    assert second.output is not None and second.output.num_tokens == 0
    assert generator.active == 0 and third.position == 1
    assert ids_of(finish(generator, third)[0]) == ids_of(alone(base, third.request))
    generator.cancel(third)
    assert third.output is not None and not third.output.cancelled


def _out_of_memory(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> list[int]:
    """Passes of more than `most` rows run out of memory, as torch says it; the sizes that were tried."""
    method, tried = getattr(Llama, name), list[int]()

    def limited(self: Llama, rows: Sequence[Any], *args: Any) -> torch.Tensor:
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("out of memory")
        made: torch.Tensor = method(self, rows, *args)
        return made

    monkeypatch.setattr(Llama, name, limited)
    return tried


@pytest.mark.parametrize("name", ["fill", "decode"])
def test_out_of_memory_fewer_go_on_and_the_others_wait(
    base: Base, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    requests = [ask([[5 + at, 6, 7]], key=(at, 0), max_tokens=5) for at in range(6)]
    expected = [ids_of(alone(base, request)) for request in requests]
    tried = _out_of_memory(monkeypatch, name, 2)
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in requests]
    found = finish(generator, *tickets)
    assert [ids_of(output) for output in found] == expected
    assert max(tried) > 2


@pytest.mark.parametrize("name", ["fill", "decode"])
def test_a_row_that_never_fits_fails_alone(
    base: Base, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = getattr(Llama, name)

    def limited(self: Llama, rows: Sequence[Any], *args: Any) -> torch.Tensor:
        first = rows[0]
        if isinstance(first, Fresh) and any(len(one.tokens) > 6 for one in rows):
            raise torch.OutOfMemoryError("out of memory")
        if not isinstance(first, Fresh) and max(args[0].lengths) > 6:
            raise torch.OutOfMemoryError("out of memory")
        made: torch.Tensor = method(self, rows, *args)
        return made

    small = ask(PROMPTS[1:2], max_tokens=4)
    expected = alone(base, small)
    monkeypatch.setattr(Llama, name, limited)
    generator = generator_of(base)
    tickets = [generator.submit(request) for request in (small, ask(PROMPTS[2:]), small)]
    while not all(ticket.done for ticket in tickets):
        generator.step()
    error = tickets[1].error
    assert error is not None and error.code == "out_of_memory"
    for ticket in (tickets[0], tickets[2]):
        assert ticket.output is not None and ids_of(ticket.output) == ids_of(expected)
