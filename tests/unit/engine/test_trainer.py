"""The rules of an accumulation: splitting, order, padding, refusals, and operations that fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import (
    gradient,
    make_row,
    make_rows,
    make_trainer,
    same,
    state,
)
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base
from workers.engine.trainer import Trainer
from workers.text.rows import pack_rows, unpack_rows

Make = Callable[..., Trainer]
ROWS = make_rows((9, 30, 17, 2), seed=7)


def _code(call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(SignalError) as caught:
        call()
    return caught.value.code, caught.value.param


@pytest.mark.parametrize("loss_fn", ["causal_lm", "cross_entropy"])
def test_one_batch_equals_its_parts_in_any_order(base64: Base, loss_fn: str) -> None:
    """Padding and batch order change nothing beyond float64's rounding (1e-12)."""
    whole, parts = make_trainer(base64), make_trainer(base64)
    together = whole.forward_backward(ROWS, loss_fn, {}, True)
    apart = [parts.forward_backward([row], loss_fn, {}, True) for row in reversed(ROWS)]
    assert together["loss_sum"] == pytest.approx(sum(one["loss_sum"] for one in apart), rel=1e-12)
    assert together["num_tokens"] == sum(one["num_tokens"] for one in apart)
    assert torch.allclose(gradient(whole), gradient(parts), rtol=1e-10, atol=1e-12)
    first, second = whole.optim_step(), parts.optim_step()
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-12)
    assert first["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-12)
    assert torch.allclose(whole.adapter.master, parts.adapter.master, rtol=0, atol=1e-9)


def test_padding_changes_nothing_in_float32(trainer: Make) -> None:
    short = ROWS[0]
    alone, padded = trainer(), trainer()
    silent = make_row(64, 99, [0.0] * 63 + [1e-30])
    alone.forward_backward([short], "cross_entropy", {}, True)
    padded.forward_backward([short, silent], "cross_entropy", {}, True)
    assert torch.allclose(gradient(alone), gradient(padded), rtol=1e-4, atol=1e-5)


def test_the_result_counts_weighted_positions(trainer: Make) -> None:
    row = make_row(4, 1, [0.0, 2.0, 0.0, 0.5])
    run = trainer()
    result = run.forward_backward([row], "causal_lm", {}, True)
    assert (result["num_tokens"], result["step"], result["metrics"]) == (2, 0, {})
    assert result["loss"] == pytest.approx(result["loss_sum"] / 2.5)
    summed = trainer().forward_backward([row], "cross_entropy", {}, True)
    assert summed["loss_sum"] == pytest.approx(result["loss_sum"])
    assert summed["loss"] == pytest.approx(summed["loss_sum"] / 2)
    assert summed["grad_norm"] == pytest.approx(result["grad_norm"] * 2.5, rel=1e-5)


def test_accumulate_false_starts_anew(trainer: Make) -> None:
    run, fresh = trainer(), trainer()
    run.forward_backward(ROWS[:2], "causal_lm", {}, True)
    run.forward_backward(ROWS[2:], "cross_entropy", {}, False)
    fresh.forward_backward(ROWS[2:], "cross_entropy", {}, True)
    assert run.accumulated == 1
    assert torch.equal(gradient(run), gradient(fresh))


def test_the_two_reductions_do_not_mix(trainer: Make) -> None:
    run = trainer()
    run.forward_backward(ROWS, "causal_lm", {}, True)
    before = state(run)
    assert _code(lambda: run.forward_backward(ROWS, "cross_entropy", {}, True)) == (
        "mixed_reductions",
        "loss_fn",
    )
    assert same(before, state(run)) and run.accumulated == 1


def test_losses_and_options_are_known_by_name(trainer: Make) -> None:
    run = trainer()
    magic = partial(run.forward_backward, ROWS, "magic", {}, True)
    assert _code(magic) == ("unknown_loss", "loss_fn")
    unknown = partial(run.forward_backward, ROWS, "causal_lm", {"beta": 1}, True)
    assert _code(unknown) == ("unknown_option", "loss_kwargs.beta")
    run.forward_backward(ROWS, "causal_lm", {}, True)
    assert _code(lambda: run.optim_step(momentum=0.9)) == ("unknown_option", "momentum")
    assert run.accumulated == 0


def test_what_the_model_cannot_take_is_refused(trainer: Make) -> None:
    run = trainer()
    run.forward_backward(ROWS, "causal_lm", {}, True)
    before = state(run)
    wrong = make_row(5, 1)
    wrong.tokens[2] = 512
    negative = make_row(5, 1)
    negative.targets[0] = -1
    silent = make_row(5, 1, [0.0] * 5)
    cases = [
        ([ROWS[0], wrong], "token_out_of_range", "batch_data.1.tokens"),
        ([ROWS[0], negative], "token_out_of_range", "batch_data.1.targets"),
        ([make_row(2049)], "sequence_too_long", "batch_data"),
        ([silent], "no_target_tokens", "batch_data"),
        ([], "validation_error", "batch_data"),
        ([make_row(2, 1, [1.0, -1.0])], "validation_error", "batch_data"),
    ]
    for rows, code, param in cases:
        call = partial(run.forward_backward, rows, "causal_lm", {}, True)
        assert _code(call) == (code, param)
    assert same(before, state(run)) and run.accumulated == 1


def test_an_operation_that_is_not_finite_leaves_no_trace(trainer: Make) -> None:
    run = trainer()
    run.forward_backward(ROWS, "cross_entropy", {}, True)
    before = state(run)
    huge = make_row(3, 1, [3e38] * 3)
    call = partial(run.forward_backward, [ROWS[0], huge, huge], "cross_entropy", {}, True)
    assert _code(call) == ("non_finite", "batch_data.1")
    assert same(before, state(run))
    run.optim_step()
    assert run.step == 1


def test_an_interrupted_operation_leaves_no_trace(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer()
    run.forward_backward(ROWS, "causal_lm", {}, True)
    before = state(run)

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", out_of_memory)
        call = partial(run.forward_backward, ROWS, "causal_lm", {}, False)
        assert _code(call) == ("out_of_memory", "batch_data.1")
    assert same(before, state(run)) and run.base.slot.terms is None
    run.forward_backward(ROWS, "causal_lm", {}, True)
    assert run.accumulated == 2


def test_optim_step_needs_gradients(trainer: Make) -> None:
    run = trainer()
    assert _code(run.optim_step)[0] == "no_gradients"
    run.forward_backward(ROWS, "causal_lm", {}, True)
    run.clear_accumulation()
    assert _code(run.optim_step)[0] == "no_gradients"
    assert run.step == 0


def test_a_gradient_that_overflows_in_the_sum_is_discarded(trainer: Make) -> None:
    run = trainer()
    large = make_row(3, 1, [1e18] * 3)
    for _ in range(2):
        run.forward_backward([large], "cross_entropy", {}, True)
    gradient_sum = run._accumulation
    assert gradient_sum is not None
    gradient_sum.gradient.fill_(math.inf)
    before = state(run)[:3]
    assert _code(run.optim_step)[0] == "non_finite"
    assert run.accumulated == 0 and run.step == 0
    assert same(before, state(run))


def test_overrides_hold_for_one_step_alone(trainer: Make) -> None:
    run, plain = trainer(), trainer()
    for one in (run, plain):
        one.forward_backward(ROWS, "causal_lm", {}, True)
    frozen = run.adapter.master.clone()
    result = run.optim_step(learning_rate=0.0, weight_decay=0.5, beta1=None)
    assert result["learning_rate"] == 0.0 and result["step"] == 1
    assert torch.equal(frozen, run.adapter.master)
    run.forward_backward(ROWS, "causal_lm", {}, True)
    assert run.optim_step()["learning_rate"] == plain.settings.learning_rate
    assert not torch.equal(frozen, run.adapter.master)


def test_a_refused_step_is_undone_and_discards_the_gradients(base: Base) -> None:
    # With B = 0 the gradient of A is exactly 0, and 0 / (sqrt(0) + 0) is not a number.
    run = make_trainer(base, noise=0.0)
    run.forward_backward(ROWS, "causal_lm", {}, True)
    before = state(run)[:3]
    with pytest.raises(SignalError, match="accumulated gradients were discarded") as caught:
        run.optim_step(eps=0.0)
    assert (caught.value.code, caught.value.param) == ("non_finite", "eps")
    assert same(before, state(run)) and run.step == 0 and run.accumulated == 0
    run.forward_backward(ROWS, "causal_lm", {}, True)
    run.optim_step(eps=1e-8)
    assert run.step == 1


def test_runs_share_a_base_without_touching_each_other(base: Base) -> None:
    first = make_trainer(base, seed=1)
    second = make_trainer(base, seed=2, r=8, targets=("q_proj", "down_proj"))
    untouched = state(second)
    alone = make_trainer(base, seed=1)
    for run in (first, alone):
        run.forward_backward(ROWS, "causal_lm", {}, True)
        run.optim_step()
        if run is first:
            assert same(untouched, state(second))
            second.forward_backward(ROWS, "cross_entropy", {}, True)
            second.optim_step()
    assert same(state(first), state(alone))
    assert second.num_trainable_parameters < first.num_trainable_parameters


def test_adapter_off_is_the_bare_base(base: Base) -> None:
    tokens = torch.arange(4, 24).unsqueeze(0)
    bare = base.decoder.hidden(tokens)
    run = make_trainer(base)
    with base.activated(run.adapter):
        adapted = base.decoder.hidden(tokens)
    assert not torch.allclose(bare, adapted, atol=1e-3)
    assert torch.equal(bare, base.decoder.hidden(tokens))
    with base.activated(None):
        assert torch.equal(bare, base.decoder.hidden(tokens))
    fresh = Trainer(base, run.adapter.spec, AdamWSettings())
    with base.activated(fresh.adapter):
        # B starts at 0: a new adapter changes nothing.
        assert torch.equal(bare, base.decoder.hidden(tokens))


def test_checkpointing_computes_the_same(trainer: Make) -> None:
    plain, saving = trainer(), trainer(gradient_checkpointing=True)
    first = plain.forward_backward(ROWS, "causal_lm", {}, True)
    second = saving.forward_backward(ROWS, "causal_lm", {}, True)
    assert first == second
    assert torch.equal(gradient(plain), gradient(saving))


def test_the_start_is_a_function_of_the_seed(base: Base) -> None:
    torch.manual_seed(1)
    first = make_trainer(base, seed=5, noise=0.0)
    torch.manual_seed(2)
    again, other = make_trainer(base, seed=5, noise=0.0), make_trainer(base, seed=6, noise=0.0)
    assert torch.equal(first.adapter.master, again.adapter.master)
    assert not torch.equal(first.adapter.master, other.adapter.master)
    tensors = first.adapter.tensors()
    a, b = (
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"],
        tensors["model.layers.0.self_attn.q_proj.lora_B.weight"],
    )
    assert a.shape == (4, 64) and b.shape == (64, 4)
    assert 0.1 < float(a.abs().max()) <= 1 / 8 and not b.any()


def test_rows_from_the_journal_are_read_as_they_are(trainer: Make) -> None:
    first, second = trainer(), trainer()
    unpacked = unpack_rows(pack_rows(ROWS))
    assert first.forward_backward(unpacked, "causal_lm", {}, True) == second.forward_backward(
        ROWS, "causal_lm", {}, True
    )


def test_an_unknown_target_names_the_field(base: Base) -> None:
    assert _code(lambda: make_trainer(base, targets=("q_proj", "w_pack"))) == (
        "validation_error",
        "lora_target_modules",
    )
