"""Each optimizer against an independent one, its state through capture and restore, and the schedules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import make_rows
from workers.engine import adamw_8bit
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base
from workers.engine.certificate import certificate
from workers.engine.lora import LoraSpec
from workers.engine.optimizer import default_settings, make_optimizer
from workers.engine.schedule import Name, Schedule
from workers.engine.trainer import Trainer

SETTINGS = AdamWSettings(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-7)
NAMES = ("adamw", "lion", "adamw_8bit")
ROWS = make_rows((9, 20), seed=3)


@pytest.fixture
def library() -> Any:
    """bitsandbytes, which is optional."""
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each optimizer that runs here."""
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    chosen: str = request.param
    return chosen


def _steps(name: str, oracle: Any, size: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters after five steps of ours, and of torch's or another's optimizer."""
    torch.manual_seed(0)
    ours = torch.randn(size)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer, other = make_optimizer(name, ours), oracle(theirs)
    for _ in range(5):
        gradient = torch.randn(size)
        theirs.grad = gradient.clone()
        optimizer.step(gradient, float(gradient.norm()), SETTINGS)
        other.step()
    return ours, theirs.detach()


def test_adamw_equals_torch() -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    ours, theirs = _steps("adamw", lambda p: torch.optim.AdamW([p], **options))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adamw_8bit_equals_bitsandbytes(library: Any) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    ours, theirs = _steps("adamw_8bit", lambda p: library.optim.AdamW8bit([p], **options))
    assert torch.equal(ours, theirs)


class _Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, in its own words and order."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__([parameter], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            c = 0.8 * m + (1 - 0.8) * p.grad
            p.copy_(p - 1e-2 * (c.sign() + 0.1 * p))
            m.copy_(0.95 * m + (1 - 0.95) * p.grad)


def test_lion_equals_its_paper() -> None:
    torch.manual_seed(0)
    ours = torch.randn(5000)
    theirs = torch.nn.Parameter(ours.clone())
    lion, other = make_optimizer("lion", ours), _Lion(theirs)
    settings = AdamWSettings(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95)
    for _ in range(5):
        gradient = torch.randn(5000)
        theirs.grad = gradient.clone()
        lion.step(gradient, float(gradient.norm()), settings)
        other.step()
    assert torch.allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_every_optimizer_goes_on_from_a_captured_state(base: Base, name: str) -> None:
    spec = LoraSpec(r=4, seed=1)
    settings = default_settings(name)
    first, second = (Trainer(base, spec, settings, optimizer=name) for _ in range(2))
    for _ in range(2):
        first.forward_backward(ROWS, "causal_lm", {})
        first.optim_step()
    first.forward_backward(ROWS, "causal_lm", {})
    second.restore(first.capture())
    assert certificate(first.capture()) == certificate(second.capture())
    for run in (first, second):
        run.optim_step()
        run.forward_backward(ROWS, "causal_lm", {})
    assert certificate(first.capture()) == certificate(second.capture())
    assert first.step == 3
    other = Trainer(base, spec, settings, optimizer="lion" if name == "adamw" else "adamw")
    with pytest.raises(SignalError, match=r"optimizer\.name") as caught:
        other.restore(first.capture())
    assert caught.value.code == "state_mismatch"


def test_eps_is_refused_where_it_means_nothing(base: Base) -> None:
    run = Trainer(base, LoraSpec(r=2), default_settings("lion"), optimizer="lion")
    run.forward_backward(ROWS, "causal_lm", {})
    with pytest.raises(SignalError, match="were discarded") as caught:
        run.optim_step(eps=1e-6)
    assert (caught.value.code, caught.value.param) == ("unknown_option", "eps")
    assert run.accumulated == 0 and run.step == 0


def test_8bit_is_refused_with_the_reason_where_it_does_not_run(
    base: Base, base64: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw_8bit._library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(SignalError) as caught:
            Trainer(base, LoraSpec(r=2), AdamWSettings(), optimizer="adamw_8bit")
    assert (caught.value.code, caught.value.param) == ("not_supported", "optimizer")
    assert "not installed" in caught.value.message
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SignalError, match="float64") as caught:
        Trainer(base64, LoraSpec(r=2), AdamWSettings(), optimizer="adamw_8bit")
    assert (caught.value.code, caught.value.param) == ("not_supported", "optimizer")


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_schedules_equal_transformers(schedule: Name, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    ours = Schedule(schedule, warmup, None if schedule.startswith("constant") else 10)
    for step in range(12):
        if schedule == "cosine" and step > 10:
            assert ours.factor(step) == 0.0  # theirs rises again
            break
        assert ours.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_step_follows_the_schedule_unless_its_rate_is_given(base: Base) -> None:
    run = Trainer(
        base, LoraSpec(r=2), AdamWSettings(1e-2), schedule=Schedule("linear", 1, total_steps=3)
    )
    rates = []
    for override in (None, None, 0.5, None):
        run.forward_backward(ROWS, "causal_lm", {})
        rates.append(run.optim_step(learning_rate=override)["learning_rate"])
    assert rates == pytest.approx([0.0, 1e-2, 0.5, 0.0])
