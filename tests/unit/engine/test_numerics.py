"""Loss, gradients and optimizer steps equal a plain torch + transformers + peft loop on the same data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.engine import reference
from tests.unit.engine.support import gradient, make_rows, make_trainer
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LENGTHS = (7, 19, 1, 12)
ADAMW = AdamWSettings(learning_rate=3e-3, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-7)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
@pytest.mark.parametrize("loss_fn", ["causal_lm", "cross_entropy"])
def test_float64_training_equals_peft(tiny: Path, base64: Base, loss_fn: str, own: bool) -> None:
    # Behind transformers' float32 norms one rounding more or less is 6e-8.
    limit = 1e-9 if own else 1e-6
    base = base64 if own else load_base(tiny, dtype="float64", threads=1, own=False)
    trainer = make_trainer(base, adamw=ADAMW)
    model = reference.reference_model(tiny, trainer, torch.float64, full_precision=own)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=ADAMW.learning_rate,
        weight_decay=ADAMW.weight_decay,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
    )
    for step in range(4):
        rows = make_rows(LENGTHS, seed=step)
        optimizer.zero_grad()
        loss_sum, weight = reference.reference_loss(model, rows)
        loss = loss_sum / weight if loss_fn == "causal_lm" else loss_sum
        loss.backward()  # type: ignore[no-untyped-call]
        found = trainer.forward_backward(rows, loss_fn, {}, True)
        expected = reference.reference_gradient(model, trainer)
        divisor = weight if loss_fn == "causal_lm" else 1.0
        assert found["loss_sum"] == pytest.approx(loss_sum.item(), rel=limit)
        assert found["grad_norm"] == pytest.approx(expected.norm().item(), rel=limit)
        assert _relative(gradient(trainer) / divisor, expected) < limit
        # The last step is clipped, in torch's way.
        clip = 0.5 * found["grad_norm"] if step == 3 else 0.0
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        stepped = trainer.optim_step(grad_clip_norm=clip)
        assert stepped["grad_norm"] == pytest.approx(found["grad_norm"], rel=1e-12)
        assert _relative(trainer.adapter.master, reference.reference_values(model, trainer)) < limit
    if loss_fn == "causal_lm":
        assert found["loss"] == pytest.approx(loss.item(), rel=limit)


def test_float32_gradient_equals_peft_to_1e_4(tiny: Path, base: Base) -> None:
    trainer = make_trainer(base)
    model = reference.reference_model(tiny, trainer, torch.float32)
    rows = make_rows(LENGTHS, seed=5)
    loss_sum, _ = reference.reference_loss(model, rows)
    loss_sum.backward()  # type: ignore[no-untyped-call]
    found = trainer.forward_backward(rows, "cross_entropy", {}, True)
    assert found["loss_sum"] == pytest.approx(loss_sum.item(), rel=1e-4)
    assert _relative(gradient(trainer), reference.reference_gradient(model, trainer)) < 1e-4


def test_the_loss_falls_when_one_batch_is_learnt(base: Base) -> None:
    trainer = make_trainer(base, noise=0.0)
    rows = make_rows((16, 16), seed=3)
    losses = []
    for _ in range(30):
        losses.append(trainer.forward_backward(rows, "causal_lm", {}, True)["loss"])
        trainer.optim_step(learning_rate=0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_stays_near_float32(tiny: Path, base: Base) -> None:
    coarse = load_base(tiny, dtype="bfloat16", threads=1)
    trainers = make_trainer(base), make_trainer(coarse)
    rows = make_rows(LENGTHS, seed=2)
    exact, rounded = (trainer.forward_backward(rows, "causal_lm", {}, True) for trainer in trainers)
    assert trainers[1].adapter.master.dtype == torch.float32
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert _relative(gradient(trainers[1]), gradient(trainers[0])) < 0.1
    # A small step must not vanish in bfloat16: the master takes it.
    before = trainers[1].adapter.master.clone()
    trainers[1].optim_step(learning_rate=1e-6)
    assert not torch.equal(before, trainers[1].adapter.master)
