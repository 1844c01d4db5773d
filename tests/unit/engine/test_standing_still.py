"""An operation that stands still between its micro-batches while another run's computes: no bit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import gradient, make_rows, make_trainer, same, state
from workers.engine import memory
from workers.engine.base import Base, load_base
from workers.engine.sampler import SampleParams
from workers.engine.trainer import Trainer

ROWS = make_rows((9, 20, 14, 30, 7, 11), seed=4)


@pytest.fixture
def base(base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Base]:
    """In micro-batches of a row or two."""
    monkeypatch.setattr(memory, "_FEWEST_TOKENS", 4)
    monkeypatch.setitem(memory._MOST_TOKENS, "cpu", 30)
    yield base
    base.pause = lambda: None


class NoText:
    """A tokenizer that knows no text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Nothing."""
        return ""


def another(base: Base) -> Trainer:
    return make_trainer(base, r=2, seed=8, targets=("q_proj", "down_proj"))


def work(run: Trainer, number: int) -> None:
    run.forward_backward(make_rows((6, 12), seed=number), "causal_lm", {})
    run.forward(make_rows((5,), seed=number))
    run.optim_step()


def in_between(base: Base, other: Trainer, counts: list[int]) -> Callable[[], None]:
    def pause() -> None:
        if counts and counts[-1] < 0:
            return  # an operation that is done meanwhile has pauses of its own
        counts.append(-1)
        with base.set_aside():
            work(other, len(counts))
        counts[-1] = len(counts)

    return pause


def test_both_come_to_what_they_come_to_alone(base: Base) -> None:
    alone, other_alone = make_trainer(base), another(base)
    expected = alone.forward_backward(ROWS, "causal_lm", {})
    batches = len(expected["plan"]["batches"])
    for number in range(1, batches):
        work(other_alone, number)
    run, other, counts = make_trainer(base), another(base), list[int]()
    base.pause = in_between(base, other, counts)
    assert run.forward_backward(ROWS, "causal_lm", {}) == expected
    assert len(counts) == batches - 1 > 2
    assert torch.equal(gradient(run), gradient(alone))
    assert same(state(other), state(other_alone))


def test_a_pass_without_a_derivative_may_stand_still_too(base: Base) -> None:
    expected = make_trainer(base).forward(ROWS)
    run, other, counts = make_trainer(base), another(base), list[int]()
    base.pause = in_between(base, other, counts)
    assert run.forward(ROWS) == expected
    assert counts and other.step == len(counts)
    assert base.slot.terms is None and torch.is_grad_enabled()


def test_a_run_with_checkpointing_leaves_the_samples_of_another_alone(tiny_model: Path) -> None:
    """Also on a base of transformers', whose layers are told to compute themselves again."""
    base = load_base(tiny_model, own=False, threads=1)
    run, other = make_trainer(base), make_trainer(base, gradient_checkpointing=True, seed=8)

    def tokens() -> list[int]:
        params = SampleParams(
            max_tokens=12, temperature=1.0, top_p=1.0, top_k=0, stop_strings=(), stop_token_ids=(), n=1
        )  # fmt: skip
        return (
            run.sample([[5, 6, 7]], params, NoText(), lambda: False, (0, 1)).samples[0][0].token_ids
        )

    before = tokens()
    other.forward_backward(ROWS, "causal_lm", {})
    assert tokens() == before


def test_what_fails_meanwhile_leaves_what_stood_still_in_place(base: Base) -> None:
    run, broken = make_trainer(base), another(base)
    with base.activated(run.adapter):
        before = base.slot.terms
        with base.set_aside(), pytest.raises(SignalError):
            broken.forward_backward(ROWS, "no such loss", {})
        with base.set_aside(), pytest.raises(SignalError):
            broken.optim_step()
        assert base.slot.terms is before
