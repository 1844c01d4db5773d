"""The table of losses: options by type and range, an operator's own loss, and the page made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import docs_losses
from schemas.errors import SignalError
from schemas.examples import FORMS, TrainingExample
from schemas.losses import BUILT_IN, find_loss, losses

INF = float("inf")

OWN = """
from dataclasses import replace

from schemas.losses import BUILT_IN

FOCAL = replace(BUILT_IN["cross_entropy"], name="focal", implementation="own_losses_torch:LOSS")
BROKEN = "no spec"
DPO = replace(BUILT_IN["dpo"], summary="another's")
"""
OWN_TORCH = """
from workers.engine.losses import Loss, LossOutput

LOSS = Loss(
    "focal",
    lambda data, options: LossOutput((-(1 - data.logprobs.exp()) ** 2 * data.logprobs).sum()),
    reduction=lambda options: "sum",
)
"""
POINTS = """
[signal.losses]
focal = own_losses:FOCAL
broken = own_losses:BROKEN
missing = no_such_module:X
dpo = own_losses:DPO
"""
SCRIPT = """
import sys, logging
logging.disable()
sys.path.insert(0, sys.argv[1])
from schemas.losses import find_loss, losses
assert "torch" not in sys.modules
print(int("focal" in losses()), len(losses()), find_loss("dpo").summary)
from workers.engine.losses import resolve_loss
import torch
from workers.engine.losses import LossInput
one = torch.zeros(1)
print(resolve_loss("focal", {})(LossInput(one - 1, one + 1, one.long(), 1)).loss_sum.item())
"""


@pytest.mark.parametrize(
    ("loss", "options", "wrong"),
    [
        ("dpo", {"beta": 0}, {"beta"}),
        ("dpo", {"beta": "0.1"}, {"beta"}),
        ("dpo", {"beta": True}, {"beta"}),
        ("dpo", {"beta": None}, {"beta"}),
        ("dpo", {"beta": INF}, {"beta"}),
        ("dpo", {"beta": float("nan")}, {"beta"}),
        ("dpo", {"beta": 10**400}, {"beta"}),
        ("dpo", {"label_smoothing": 0.5}, {"label_smoothing"}),
        ("dpo", {"label_smoothing": -0.1, "epsilon": 0.2, "beta": 1}, {"label_smoothing", "epsilon"}),
        ("ppo", {"epsilon": 1.5}, {"epsilon"}),
        ("ppo", {"epsilon_high": -1}, {"epsilon_high"}),
        ("ppo", {"beta": 0.1}, {"beta"}),
        ("grpo", {"loss_type": "sapo"}, {"loss_type"}),
        ("grpo", {"loss_type": ["grpo"]}, {"loss_type"}),
        ("grpo", {"loss_type": "dr_grpo"}, {"max_completion_length"}),
        ("grpo", {"max_completion_length": 5}, {"max_completion_length"}),
        ("grpo", {"loss_type": "dr_grpo", "max_completion_length": 5.0}, {"max_completion_length"}),
        ("grpo", {"use_bias_correction_kl": 1}, {"use_bias_correction_kl"}),
        ("grpo", {"use_bias_correction_kl": True}, {"use_bias_correction_kl"}),
        ("cispo", {"clip_low_threshold": 2, "clip_high_threshold": 1}, {"clip_low_threshold"}),
        ("cross_entropy", {"beta": 0.1}, {"beta"}),
    ],
)  # fmt: skip
def test_wrong_options_are_named(loss: str, options: dict[str, Any], wrong: set[str]) -> None:
    details = find_loss(loss).problems(options)
    assert {detail.param for detail in details} == {f"loss_kwargs.{name}" for name in wrong}
    own = {option.name for option in find_loss(loss).options}
    for detail in details:
        known = (detail.param or "").rpartition(".")[2] in own
        assert detail.code == ("validation_error" if known else "unknown_option")


@pytest.mark.parametrize("loss", BUILT_IN)
def test_the_defaults_are_allowed(loss: str) -> None:
    spec = BUILT_IN[loss]
    assert spec.problems({}) == []
    given = spec.resolved({})
    if spec.option("max_completion_length") is None:
        assert spec.problems(given) == []
    assert spec.resolved(given) == given


def test_a_number_is_one_however_it_is_written() -> None:
    assert find_loss("dpo").resolved({"beta": 1}) == find_loss("dpo").resolved({"beta": 1.0})
    assert isinstance(find_loss("dpo").resolved({"beta": 1})["beta"], float)


def test_an_unknown_loss_names_those_that_there_are() -> None:
    with pytest.raises(SignalError) as caught:
        find_loss("magic", "operations.0.loss_fn")
    assert (caught.value.code, caught.value.param) == ("unknown_loss", "operations.0.loss_fn")
    assert "dpo" in caught.value.message


def test_the_table_speaks_of_fields_that_there_are() -> None:
    fields = set(TrainingExample._declared_fields)
    for spec in losses().values():
        assert set(spec.forms) <= set(FORMS)
        assert set(spec.needs) | set(spec.takes) <= fields
        assert {option.origin for option in spec.options} <= {"TRL", "Tinker", "Signal"}


def test_an_operators_own_loss_needs_no_fork(tmp_path: Path) -> None:
    """What is wrong with one of a package's losses leaves that one out and no other."""
    (tmp_path / "own_losses.py").write_text(OWN)
    (tmp_path / "own_losses_torch.py").write_text(OWN_TORCH)
    info = tmp_path / "own_losses-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-losses\nVersion: 1\n")
    (info / "entry_points.txt").write_text(POINTS)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"1 {len(BUILT_IN) + 1} {BUILT_IN['dpo'].summary}"
    # (1 - e^-1)^2, with lp = -1.
    assert float(second) == pytest.approx(0.3995764008, rel=1e-6)


def test_the_page_is_up_to_date() -> None:
    assert docs_losses.main(["--check"]) == 0, "make docs-losses"
