"""Losses through the trainer: on real log-probabilities, against transformers and peft, split and refused."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from schemas.errors import SignalError
from schemas.losses import BUILT_IN
from tests.unit.engine import reference
from tests.unit.engine.support import VOCAB, gradient, make_row, make_trainer, same, state
from workers.engine import memory
from workers.engine.base import Base
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.text.rows import Row, pack_rows, unpack_rows

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Make = Callable[..., Trainer]
LENGTHS = (9, 4, 12, 7, 5, 8)
SAMPLED = ("logprobs", "advantages", "ref_logprobs", "values", "returns")
# Rows that a loss takes, and options under which it asks for all that it can ask for.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BUILT_IN),
    ("ppo", {"entropy_coef": 0.1}),
    ("grpo", {"loss_type": "grpo", "beta": 0.1}),
    ("grpo", {"loss_type": "dr_grpo", "max_completion_length": 9}),
]


def rows_for(name: str, seed: int = 0) -> list[Row]:
    """Rows with prompts of 2 tokens and everything that the loss needs; the reference is left to compute."""
    rng, spec = np.random.default_rng(seed), BUILT_IN[name]
    rows = []
    for number, length in enumerate(LENGTHS):
        plain = make_row(length, seed * 100 + number, [0.0, 0.0] + [1.0] * (length - 2))
        names = [one for one in spec.needs if one in SAMPLED]
        arrays = {
            one: array("f", rng.normal(-5 if one == "logprobs" else 0, 0.5, length))
            for one in names
        }
        values = {"label": float(number % 2)} if "label" in spec.needs else {}
        example = number
        if spec.forms == ("preference",):
            values, example = {"chosen": float(number % 2 == 0)}, number // 2
        rows.append(Row(plain.tokens, plain.targets, plain.weights, arrays, values, example))
    if spec.mismatched:
        own = [(row.tokens, row.targets, row.weights) for row in rows]
        rows += [
            Row(*parts, example=number, trained=False)
            for number, parts in enumerate(own[1:] + own[:1])
        ]
    return rows


def logprobs_of(model: Any, row: Row) -> Tensor:
    """Of a row's counted positions, by transformers."""
    tokens, targets = (torch.tensor(list(part)) for part in (row.tokens, row.targets))
    logits = model(input_ids=tokens.unsqueeze(0)).logits[0]
    every = -cross_entropy(logits, targets, reduction="none")
    return every[torch.tensor(list(row.weights)) != 0]


def sums(model: Any, rows: Sequence[Row]) -> Tensor:
    return torch.stack([logprobs_of(model, row).sum() for row in rows])


def compare(
    trainer: Trainer, model: Any, loss: Tensor, found: dict[str, Any], divisor: float
) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    expected = reference.reference_gradient(model, trainer)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert found["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-8)
    difference = gradient(trainer) / divisor - expected
    assert float(difference.norm() / expected.norm()) < 1e-8


def test_dpo_equals_peft_with_the_adapter_off(tiny: Path, base64: Base) -> None:
    trainer, rows = make_trainer(base64), rows_for("dpo")
    model = reference.reference_model(tiny, trainer, torch.float64)
    with torch.no_grad(), model.disable_adapter():
        ref = sums(model, rows)
    ratios = sums(model, rows) - ref
    loss = -logsigmoid(0.3 * (ratios[0::2] - ratios[1::2])).mean()
    found = trainer.forward_backward(rows, "dpo", {"beta": 0.3})
    compare(trainer, model, loss, found, 3)
    margins = 0.3 * (ratios[0::2] - ratios[1::2]).detach()
    assert found["metrics"]["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-9)


def test_kto_takes_its_baseline_from_the_whole_batch(tiny: Path, base64: Base) -> None:
    trainer, rows = make_trainer(base64), rows_for("kto")
    model = reference.reference_model(tiny, trainer, torch.float64)
    with torch.no_grad():
        with model.disable_adapter():
            ref = sums(model, rows)
        kl = (sums(model, rows) - ref)[6:].mean().clamp(min=0).item()
    ratios = sums(model, rows[:6]) - ref[:6]
    sign = torch.tensor([-1.0, 1.0] * 3, dtype=torch.float64)
    loss = (1 - torch.sigmoid(0.1 * sign * (ratios - kl))).mean()
    found = trainer.forward_backward(rows, "kto", {})
    assert found["metrics"]["kl"] == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert found["num_tokens"] == sum(LENGTHS) - 12
    compare(trainer, model, loss, found, 6)


def test_grpo_with_a_kl_to_the_base_equals_peft(tiny: Path, base64: Base) -> None:
    trainer, rows = make_trainer(base64), rows_for("grpo")
    model = reference.reference_model(tiny, trainer, torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        with torch.no_grad(), model.disable_adapter():
            ref = logprobs_of(model, row)
        logprobs = logprobs_of(model, row)
        ratio = torch.exp(logprobs - logprobs.detach())
        advantages = torch.tensor(list(row.arrays["advantages"]), dtype=torch.float64)[2:]
        kl = torch.exp(ref - logprobs) - (ref - logprobs) - 1
        loss = loss + (-ratio * advantages + 0.2 * kl).mean() / len(rows)
    found = trainer.forward_backward(rows, "grpo", {"loss_type": "grpo", "beta": 0.2})
    compare(trainer, model, loss, found, len(rows))


def test_entropy_reaches_the_adapter(tiny: Path, base64: Base) -> None:
    trainer, rows = make_trainer(base64), rows_for("ppo")
    for row in rows:
        row.arrays["advantages"][:] = array("f", bytes(4 * len(row)))  # type: ignore[index]
    model = reference.reference_model(tiny, trainer, torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor(list(row.tokens)).unsqueeze(0)).logits[0][2:]
        loss = loss - 0.5 * torch.distributions.Categorical(logits=logits).entropy().sum()
    found = trainer.forward_backward(rows, "ppo", {"entropy_coef": 0.5})
    found["loss"] = found["loss_sum"]
    compare(trainer, model, loss, found, 1)


def test_several_targets_per_position_equal_soft_labels(tiny: Path, base64: Base) -> None:
    trainer, rng = make_trainer(base64), np.random.default_rng(4)
    plain = make_row(6, 1)
    targets = np.stack([rng.choice(VOCAB, 3, replace=False) for _ in range(6)])
    weights = rng.random((6, 3)).astype(np.float32)
    weights[1:3] = 0
    wide = Row(
        plain.tokens,
        array("i", targets.astype(np.int32).tobytes()),
        array("f", weights.tobytes()),
    )
    model = reference.reference_model(tiny, trainer, torch.float64)
    logits = model(input_ids=torch.tensor(list(plain.tokens)).unsqueeze(0)).logits[0]
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(targets))
    loss = -(chosen * torch.from_numpy(weights).double()).sum()
    found = trainer.forward_backward(unpack_rows(pack_rows([wide])), "cross_entropy", {})
    assert found["num_tokens"] == 12
    found["loss"] = found["loss_sum"]
    compare(trainer, model, loss, found, 1)


def test_rows_of_one_and_of_many_targets_share_a_micro_batch(base64: Base) -> None:
    plain, base_row = make_row(5, 2, [0.0, 1.0, 2.0, 1.0, 1.0]), make_row(6, 1)
    targets = array("i", [number for target in base_row.targets for number in (target, 7, 9)])
    wide = Row(base_row.tokens, targets, array("f", [1, 0, 0.5, 0, 0, 0, *[0.25, 0, 0] * 4]))
    whole, parts = make_trainer(base64), make_trainer(base64)
    # The entropy of a position counts at each of its targets.
    options = {"entropy_coef": 0.3}
    arrays = {name: array("f", [0.5 if name == "advantages" else -3.0] * 6) for name in SAMPLED[:2]}
    rows = [
        Row(row.tokens, row.targets, row.weights, {n: a[: len(row)] for n, a in arrays.items()})
        for row in (plain, wide, plain)
    ]
    together = whole.forward_backward(rows, "ppo", options)
    assert len(together["plan"]["batches"]) == 1
    assert together["num_tokens"] == 4 + 6 + 4
    found = [parts.forward_backward([row], "ppo", options) for row in rows]
    assert together["loss_sum"] == pytest.approx(sum(one["loss_sum"] for one in found), rel=1e-9)
    assert torch.allclose(gradient(whole), gradient(parts), rtol=1e-9, atol=1e-12)
    answers = whole.forward(rows, top_k=2)["rows"]
    for row, answer in zip(rows, answers, strict=True):
        (alone,) = whole.forward([row], top_k=2)["rows"]
        assert answer["top_token_ids"] == alone["top_token_ids"]
        assert [one is None for one in answer["logprobs"]] == [
            one is None for one in alone["logprobs"]
        ]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_batch_may_be_split_over_calls(base64: Base, name: str, options: dict[str, Any]) -> None:
    if name == "kto":
        options = {"beta": 0.2}
    rows, size = rows_for(name), 2 if BUILT_IN[name].forms == ("preference",) else 1
    whole, parts = make_trainer(base64), make_trainer(base64)
    together = whole.forward_backward(rows, name, options)
    results = []
    for start in range(0, 6, size):
        call = rows[start : start + size]
        if BUILT_IN[name].mismatched:
            # Its baseline is of a call by definition: the same rows each time.
            call = call + rows[6:]
        results.append(parts.forward_backward(call, name, options))
    assert sum(one["loss_sum"] for one in results) == pytest.approx(together["loss_sum"], rel=1e-9)
    assert torch.allclose(gradient(whole), gradient(parts), rtol=1e-8, atol=1e-11)
    first, second = whole.optim_step(), parts.optim_step()
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-9)
    assert first["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_batch_may_be_split_over_micro_batches(
    base64: Base, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever memory there is; and the record of it repeats every bit."""
    rows = rows_for(name)
    whole, parts, again = (make_trainer(base64) for _ in range(3))
    together = whole.forward_backward(rows, name, options)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_FEWEST_TOKENS", 16)
        patch.setattr(parts.budget, "ceiling", 16)
        made = parts.forward_backward(rows, name, options)
    plan = made["plan"]
    passes = [plan, *(plan[key] for key in ("reference", "statistics") if key in plan)]
    assert all(len(one["batches"]) > 1 for one in passes)
    assert len(together["plan"]["batches"]) == 1
    assert made["metrics"] == pytest.approx(together["metrics"], rel=1e-8, abs=1e-10)
    assert made["loss_sum"] == pytest.approx(together["loss_sum"], rel=1e-9)
    assert torch.allclose(gradient(whole), gradient(parts), rtol=1e-8, atol=1e-11)
    assert again.forward_backward(rows, name, options, plan=plan) == made
    assert torch.equal(gradient(again), gradient(parts))


def test_reference_and_statistics_are_replayed_by_plans_of_their_own(base64: Base) -> None:
    run, rows = make_trainer(base64), rows_for("kto")
    plan = run.forward_backward(rows, "kto", {})["plan"]
    assert set(plan) == {"batches", "kernel", "reference", "statistics"}
    units = [unit for batch in plan["batches"] for unit in batch]
    assert sorted(units) == [[number] for number in range(6)]
    before = state(run)
    for wrong in ({**plan, "reference": None}, {**plan, "statistics": plan["reference"]}, []):
        with pytest.raises(SignalError) as caught:
            run.forward_backward(rows, "kto", {}, plan=wrong)
        assert caught.value.code == "state_mismatch"
    assert same(before, state(run))


def test_neither_reference_nor_statistics_drop_anything(base64: Base) -> None:
    """With dropout the ratios differ from those without by what the training pass drops alone."""
    lora = LoraSpec(r=4, alpha=8.0, seed=1, dropout=0.5)
    plain, rows = make_trainer(base64), rows_for("kto")
    dropping = Trainer(base64, lora, plain.settings)
    dropping.adapter.master.copy_(plain.adapter.master)
    dropping.adapter.renew()
    first = plain.forward_backward(rows, "kto", {"beta": 0.2})
    second = dropping.forward_backward(rows, "kto", {"beta": 0.2}, seq=3)
    assert first["metrics"]["kl"] == second["metrics"]["kl"]
    assert first["loss_sum"] != second["loss_sum"]
    assert plain.forward(rows)["rows"] == dropping.forward(rows)["rows"]


@pytest.mark.parametrize(
    ("first", "second", "mixes"),
    [
        ("causal_lm", "grpo", True),
        ("dpo", "simpo", True),
        ("cross_entropy", "ppo", True),
        ("causal_lm", "dpo", False),
        ("dpo", "kto", False),
        ("ppo", "grpo", False),
    ],
)
def test_what_shares_an_accumulation(trainer: Make, first: str, second: str, mixes: bool) -> None:
    run = trainer()
    run.forward_backward(rows_for(first), first, {})
    before = state(run)
    if mixes:
        run.forward_backward(rows_for(second), second, {})
        assert run.accumulated == 2
        return
    with pytest.raises(SignalError) as caught:
        run.forward_backward(rows_for(second), second, {})
    assert caught.value.code == "mixed_reductions"
    assert same(before, state(run))


def test_an_example_that_is_not_finite_is_named(trainer: Make) -> None:
    run, rows = trainer(), rows_for("importance_sampling")
    run.forward_backward(rows, "importance_sampling", {})
    before = state(run)
    # A ratio of e^995.
    rows[4].arrays["logprobs"][:] = array("f", [-1000.0] * len(rows[4]))  # type: ignore[index]
    with pytest.raises(SignalError) as caught:
        run.forward_backward(rows, "importance_sampling", {})
    assert (caught.value.code, caught.value.param) == ("non_finite", "batch_data.4")
    assert same(before, state(run))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_pair_that_is_not_finite_is_named_by_its_example(trainer: Make, bad: float) -> None:
    run, rows = trainer(), []
    for number, row in enumerate(rows_for("dpo")):
        values = {"chosen": row.values["chosen"], "ref_logps": bad if number == 3 else -1.0}
        rows.append(Row(row.tokens, row.targets, row.weights, {}, values, number // 2 + 4))
    before = state(run)
    with pytest.raises(SignalError) as caught:
        run.forward_backward(rows, "dpo", {})
    assert (caught.value.code, caught.value.param) == ("non_finite", "batch_data.5")
    assert same(before, state(run))
    rows[3] = Row(
        rows[3].tokens,
        rows[3].targets,
        rows[3].weights,
        {},
        dict(rows[2].values) | {"chosen": 0.0},
        5,
    )
    run.forward_backward(rows, "dpo", {})


def test_a_custom_gradient_of_nothing_is_a_step_of_nothing(trainer: Make) -> None:
    run = trainer()
    found = run.forward_backward([make_row(4, 1, [0.0] * 4)], "custom", {})
    assert (found["loss_sum"], found["num_tokens"], found["grad_norm"]) == (0.0, 0, 0.0)
    assert run.accumulated == 1
    assert not gradient(run).any()
    assert run.optim_step(weight_decay=0.0)["grad_norm"] == 0.0


def test_a_custom_loss_in_two_passes_is_the_loss_itself(base64: Base) -> None:
    """The client's loss here is cross_entropy, which the server knows too."""
    own, known = make_trainer(base64), make_trainer(base64)
    rows = [make_row(7, 1), make_row(5, 2)]
    negative = [
        Row(row.tokens, row.targets, array("f", [-weight for weight in row.weights]))
        for row in rows
    ]
    own.forward_backward(negative, "custom", {})
    known.forward_backward(rows, "cross_entropy", {})
    assert torch.equal(gradient(own), gradient(known))


def test_equal_rewards_move_nothing(trainer: Make) -> None:
    run, rows = trainer(), rows_for("grpo")
    silent = [
        Row(
            row.tokens,
            row.targets,
            row.weights,
            {"advantages": array("f", bytes(4 * len(row)))},
            {"reward": 1.0, "zero_std": 1.0},
            number,
        )
        for number, row in enumerate(rows)
    ]
    found = run.forward_backward(silent, "grpo", {})
    assert found["grad_norm"] == 0.0
    assert found["metrics"]["frac_reward_zero_std"] == 1.0
