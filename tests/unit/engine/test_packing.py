"""Packing, micro-batches and their plan: numbers do not depend on them, bits do, and a plan repeats them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine import reference
from tests.unit.engine.support import gradient, make_rows, make_trainer
from workers.engine import attention, passes
from workers.engine.base import Base, load_base
from workers.engine.plan import Plan, make_plan
from workers.engine.trainer import Trainer

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Make = Callable[..., Trainer]
LENGTHS = (9, 30, 17, 2, 30, 1, 30)
ROWS = make_rows(LENGTHS, seed=7)
UNITS = [(0,), (1,), (2,)]


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def _by_one(base: Base, checkpoint: bool = False) -> tuple[float, torch.Tensor]:
    """The loss and the gradient when every row goes through by itself: there is nothing to pack."""
    run = make_trainer(base, gradient_checkpointing=checkpoint)
    total = sum(run.forward_backward([row], "cross_entropy", {})["loss_sum"] for row in ROWS)
    return total, gradient(run)


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-9), ("float32", 1e-5)])
def test_packed_rows_equal_rows_by_themselves(
    tiny: Path, own: bool, dtype: str, near: float
) -> None:
    base = load_base(tiny, dtype=dtype, threads=1, own=own)
    assert base.decoder.kernel == ("segments" if own else "mask")
    loss, expected = _by_one(base)
    if not own and dtype == "float64":
        near = 1e-6  # transformers computes its norms in float32
    kernels = ["segments"] if own else ["mask", "padded"]
    for kernel in kernels:
        run = make_trainer(base)
        plan = make_plan(LENGTHS, 64, kernel).to_json()
        found = run.forward_backward(ROWS, "cross_entropy", {}, plan=plan)
        assert found["plan"] == plan and len(plan["batches"]) > 1
        assert found["loss_sum"] == pytest.approx(loss, rel=near)
        assert _distance(gradient(run), expected) < near


def test_blocks_equal_autograd_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The written-out backward is as near to float64 as torch's own, in one block and in several."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    lengths = (40, 40, 16, 7, 1)
    generator = torch.Generator().manual_seed(1)
    q, k, v, slope = (
        torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (6, 2, 2, 6)
    )
    exact = attention.attend("segments", q.double(), k.double(), v.double(), lengths)
    by_exact = exact.backward(slope.double().flatten(1))
    for kernel, near in (("segments", 2e-2), ("blocks", 2e-2)):
        made = attention.attend(kernel, q.bfloat16(), k.bfloat16(), v.bfloat16(), lengths)
        assert _distance(made.out.double(), exact.out) < near
        for found, wanted in zip(made.backward(slope.bfloat16().flatten(1)), by_exact, strict=True):
            assert found.shape == wanted.shape
            assert _distance(found.double(), wanted) < near
    again = attention.attend("blocks", q.double(), k.double(), v.double(), lengths)
    for found, wanted in zip(again.backward(slope.double().flatten(1)), by_exact, strict=True):
        assert _distance(found, wanted) < 1e-6


def test_units_stay_together_and_longest_come_first() -> None:
    plan = make_plan((5, 9, 9, 1, 3), 12, "segments", units=[(0, 3), (1,), (2,), (4,)])
    assert plan.batches == (((1,),), ((2,),), ((0, 3), (4,)))
    assert make_plan((50, 2), 10, "segments").batches == (((0,),), ((1,),))
    assert make_plan((4, 4, 1, 1), 9, "padded", padded=True).batches == (
        ((0,), (1,)),
        ((2,), (3,)),
    )


def test_a_plan_is_json_and_is_checked() -> None:
    plan = make_plan((3, 4, 5), 8, "blocks")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), UNITS) == plan
    for wrong in ({}, {"batches": [[[0], [1]]], "kernel": ""}, {"batches": 1, "kernel": ""}, None):
        with pytest.raises(SignalError) as caught:
            Plan.from_json(wrong, UNITS)
        assert caught.value.code == "state_mismatch"


def test_a_recorded_plan_gives_the_same_bits(base: Base) -> None:
    first = make_trainer(base)
    first.budget.ceiling = 64
    made = first.forward_backward(ROWS, "causal_lm", {})
    assert len(made["plan"]["batches"]) > 1
    again, fresh = make_trainer(base), make_trainer(base)
    assert again.forward_backward(ROWS, "causal_lm", {}, plan=made["plan"]) == made
    assert torch.equal(gradient(first), gradient(again))
    assert len(fresh.forward_backward(ROWS, "causal_lm", {})["plan"]["batches"]) == 1


def test_out_of_memory_halves_and_the_plan_repeats_it(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = passes.Passes._forward

    def small(self: passes.Passes, units: tuple[tuple[int, ...], ...], kernel: str) -> object:
        if sum(len(self.rows[row].tokens) for unit in units for row in unit) > 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return forward(self, units, kernel)

    first, again = make_trainer(base), make_trainer(base)
    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_forward", small)
        made = first.forward_backward(ROWS, "causal_lm", {})
    # It remembers, and no other run on the base is told.
    assert first.budget.ceiling < 1 << 62
    assert again.budget.ceiling == 1 << 62
    assert len(made["plan"]["batches"]) >= 4
    assert again.forward_backward(ROWS, "causal_lm", {}, plan=made["plan"]) == made
    assert torch.equal(gradient(first), gradient(again))


def test_only_a_row_that_does_not_fit_alone_fails(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_trainer(base)
    run.forward_backward(ROWS[:1], "causal_lm", {})
    before = gradient(run)

    def none(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_forward", none)
        with pytest.raises(SignalError) as caught:
            run.forward_backward(ROWS, "causal_lm", {})
    assert (caught.value.code, caught.value.param) == ("out_of_memory", "batch_data.1")
    assert run.accumulated == 1 and torch.equal(before, gradient(run))


def test_nothing_is_computed_below_the_first_trained_layer(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.engine.block import Block

    run, calls = make_trainer(base), []
    backward = Block.backward

    def counted(self: Block, *arguments: object) -> object:
        calls.append(self)
        return backward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Block, "backward", counted)
    for layer in list(base.decoder.layers.values())[:7]:
        run.adapter._terms[layer.index] = None
    run.forward_backward(ROWS, "causal_lm", {})
    assert len(calls) == base.config["num_hidden_layers"] - 1
    assert not gradient(run)[: len(gradient(run)) // base.config["num_hidden_layers"]].any()


def test_bfloat16_packing_stays_near_peft(tiny: Path) -> None:
    base = load_base(tiny, dtype="bfloat16", threads=1)
    assert base.decoder.kernel == "blocks"
    run = make_trainer(base)
    model = reference.reference_model(
        tiny, make_trainer(load_base(tiny, dtype="float32")), torch.float32
    )
    loss, _ = reference.reference_loss(model, ROWS)
    loss.backward()  # type: ignore[no-untyped-call]
    found = run.forward_backward(ROWS, "cross_entropy", {})
    assert found["loss_sum"] == pytest.approx(loss.item(), rel=1e-2)
    assert _distance(gradient(run), reference.reference_gradient(model, run)) < 5e-2


def test_what_the_model_says_without_a_derivative(base: Base) -> None:
    """Log-probabilities, entropy and the likeliest tokens of each counted position, in any micro-batches and
    in the order of the rows."""
    run = make_trainer(base)
    asked = passes.Passes(base, run.adapter, ROWS, asked=passes.Asked(entropy=True, top=3))
    found, one = asked.stats(make_plan(LENGTHS, 4096, "segments"))
    parts, plan = asked.stats(make_plan(LENGTHS, 40, "segments"))
    assert len(one.batches) == 1 and len(plan.batches) > 1
    assert base.slot.terms is None
    at = 0
    with torch.no_grad(), base.activated(run.adapter):
        for row in ROWS:
            hidden = base.decoder.hidden(torch.tensor([list(row.tokens)]))
            expected = base.decoder.head.logits(hidden).log_softmax(-1)
            kept = torch.tensor(list(row.weights)) != 0
            mine = slice(at, at := at + int(kept.sum()))
            targets = torch.tensor(list(row.targets))[:, None]
            logprobs = expected.gather(1, targets)[kept, 0]
            assert torch.allclose(found.logprobs[mine], logprobs, atol=1e-5)
            assert found.entropy is not None and found.top_ids is not None
            entropy = -(expected.exp() * expected).sum(1)[kept]
            assert torch.allclose(found.entropy[mine], entropy, atol=1e-5)
            assert torch.equal(found.top_ids[mine][:, 0], expected.argmax(1)[kept])
    assert at == len(found.logprobs)
    assert torch.allclose(parts.logprobs, found.logprobs, atol=1e-5)
    bare, _ = passes.Passes(base, None, ROWS).stats(plan)
    assert not torch.allclose(bare.logprobs, parts.logprobs, atol=1e-3)
