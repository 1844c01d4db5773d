"""Static steps: captured on any device as a list of tensor operations, they give what the lane gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.unit.engine.generation.support import PROMPTS, ask, finish, ids_of, logprobs_of
from tests.unit.engine.support import make_rows, make_trainer
from workers.engine import determinism
from workers.engine.base import Base
from workers.engine.generation import Generator, Request, replays
from workers.engine.generation.lane import SlabLane
from workers.engine.generation.replays import Replay, Replays
from workers.engine.generation.static_step import Shape
from workers.engine.lora import FrozenAdapter

# What asks the host for a number.
_LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """Writes down the tensor operations of one call, as a CUDA graph does: whatever the host computed in it
    stays what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.played = 0
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(look in str(func) for look in _LOOKS), f"{func} looks at a number"
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        self.played += 1
        made: dict[int, torch.Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, out in self._operations:
            found = func(*tree_map(now, args), **tree_map(now, kwargs))
            before, after = (
                [one] if isinstance(one, torch.Tensor) else one for one in (out, found)
            )
            made.update({id(old): new for old, new in zip(before, after, strict=True)})


class Tapes:
    """A `Capture` that works anywhere."""

    def __init__(self) -> None:
        self.made: list[Tape] = []
        self.forgotten = 0

    @property
    def played(self) -> int:
        return sum(tape.played for tape in self.made)

    def capture(self, run: Callable[[], None]) -> Replay:
        run()
        with Tape() as tape:
            run()
        self.made.append(tape)
        return tape.play

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture(autouse=True)
def eager_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "PATIENCE", 0)


def _weights(base: Base, seed: int, **options: Any) -> FrozenAdapter:
    frozen = make_trainer(base, seed=seed, **options).adapter.frozen()
    assert isinstance(frozen, FrozenAdapter)
    return frozen


def _generator(base: Base, capture: Any, positions: int = 1 << 16) -> Generator:
    size = base.decoder.cache_bytes_per_token
    return Generator(base, cache_bytes=positions * size, capture=capture)


def _outputs(base: Base, capture: Any, requests: Sequence[Request]) -> Any:
    """All at once, but the last joins after a few tokens."""
    generator = _generator(base, capture)
    tickets = [generator.submit(request) for request in requests[:-1]]
    for _ in range(3):
        generator.step()
    tickets.append(generator.submit(requests[-1]))
    return finish(generator, *tickets)


def _same(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert ids_of(one) == ids_of(other)
        np.testing.assert_allclose(logprobs_of(one), logprobs_of(other), rtol=0, atol=2e-5)


def _requests(base: Base, kinds: Sequence[dict[str, Any] | None]) -> Iterator[Request]:
    for at, kind in enumerate(kinds):
        weights = None if kind is None else _weights(base, at + 1, **kind)
        yield ask(weights=weights, key=(at, 0), max_tokens=6 + at, n=1 + at % 2)


@pytest.mark.parametrize(
    "kinds",
    [
        [None, None],
        [{"r": 4}, {"r": 4}],
        [{"r": 4}, None],
        [{"r": 4}, {"r": 3, "alpha": 5.0, "targets": ("q_proj", "up_proj")}, None, {"r": 9}],
    ],
)
def test_replays_give_what_the_lane_gives(base: Base, kinds: list[dict[str, Any] | None]) -> None:
    requests, tapes = list(_requests(base, kinds)), Tapes()
    _same(_outputs(base, tapes, requests), _outputs(base, None, requests))
    assert tapes.played > 6


def test_a_longer_cache_is_another_shape(base: Base) -> None:
    requests = [ask([list(range(4, 120))], max_tokens=30), ask(max_tokens=20)]
    tapes = Tapes()
    _same(_outputs(base, tapes, requests), _outputs(base, None, requests))
    # Up to 128 positions, and up to 256 after the slab has grown.
    assert len(tapes.made) >= 2 and tapes.forgotten >= 2


def test_new_weights_are_seen_by_the_same_replay(base: Base) -> None:
    trainer, tapes = make_trainer(base), Tapes()
    generator = _generator(base, tapes)
    found, expected = [], []
    for step in range(3):
        request = ask(weights=trainer.adapter.frozen(), max_tokens=8)
        found += finish(generator, generator.submit(request))
        expected += _outputs(base, None, [request, ask(max_tokens=1)])[:1]
        trainer.forward_backward(make_rows([9, 5]), "causal_lm", {}, seq=2 * step + 1)
        trainer.optim_step()
    _same(found, expected)
    assert len(tapes.made) == 1 and tapes.made[0].played == 3 * 7
    assert len({tuple(map(tuple, ids_of(one))) for one in found}) > 1


def test_rows_that_come_to_slots_of_spare_rows_are_unharmed(base: Base) -> None:
    requests = [ask(PROMPTS[:1], n=3, max_tokens=9), ask(PROMPTS[1:], n=3, max_tokens=9)]
    _same(_outputs(base, Tapes(), requests), _outputs(base, None, requests))


def test_what_may_not_depend_on_others_is_never_replayed(base: Base) -> None:
    tapes = Tapes()
    generator = _generator(base, tapes)
    finish(generator, generator.submit(ask(deterministic=True)))
    assert not tapes.made


@pytest.mark.parametrize("kind", ["live", "dora"])
def test_other_weights_are_computed_by_the_lane(base: Base, kind: str) -> None:
    adapter = make_trainer(base).adapter
    if kind == "dora":
        from workers.engine.lora import Adapter, LoraSpec

        adapter = Adapter(LoraSpec(r=4, alpha=8.0, dora=True), base.decoder.layers)
    weights = adapter if kind == "live" else adapter.frozen()
    requests, tapes = [ask(weights=weights), ask(weights=weights, key=(1, 0))], Tapes()
    _same(_outputs(base, tapes, requests), _outputs(base, None, requests))
    assert not tapes.made


def test_steps_are_captured_only_once_they_return(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "PATIENCE", 5)
    tapes, generator = Tapes(), None
    generator = _generator(base, tapes)
    finish(generator, generator.submit(ask(PROMPTS[:1], max_tokens=6)))
    assert not tapes.made
    finish(generator, generator.submit(ask(PROMPTS[:1], max_tokens=6)))
    assert len(tapes.made) == 1 and tapes.played == 5


def test_the_last_used_steps_are_kept(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST", 2)
    tapes = Tapes()
    generator = _generator(base, tapes)
    lane = generator._admission._shared
    assert isinstance(lane, SlabLane) and isinstance(lane._replays, Replays)
    for rows in (8, 1, 2, 4, 2, 1):
        finish(generator, generator.submit(ask(PROMPTS[:1], n=rows, max_tokens=4)))
        assert len(lane._replays._steps) <= 2
    # 8, 1, 2, 4, and 1 again, which 4 had pushed out.
    assert len(tapes.made) == 5


def test_where_a_capture_fails_the_lane_goes_on_and_says_so_once(
    base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Tapes):
        def capture(self, run: Callable[[], None]) -> Replay:
            run()
            raise RuntimeError("no stream to capture")

    requests = [ask(n=2), ask(key=(1, 0))]
    with caplog.at_level(logging.WARNING):
        _same(_outputs(base, Broken(), requests), _outputs(base, None, requests))
    (record,) = caplog.records
    assert "without CUDA graphs" in record.message and "no stream to capture" in record.message


def test_a_shape_beyond_the_room_is_not_captured(base: Base) -> None:
    tapes = Tapes()
    generator = _generator(base, tapes, positions=250)
    finish(generator, generator.submit(ask(PROMPTS[:1], n=3)))
    assert not tapes.made


def test_shapes_are_powers_of_two() -> None:
    assert Shape.over(1, 1) == (1, 128)
    assert Shape.over(5, 129) == (8, 256)
    assert Shape.over(64, 256) == (64, 256)


def test_writes_are_sorted_again_afterwards() -> None:
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        with determinism.unsorted_writes():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False)
