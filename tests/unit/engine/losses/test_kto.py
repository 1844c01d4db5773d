"""kto against the formula as TRL's trainer writes it: chosen and rejected apart, then together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.engine.losses.support import DTYPE, Padded, as_input, check, make_padded
from workers.engine.losses import merged, resolve_loss

LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=DTYPE)


def labelled(labels: Tensor = LABELS) -> Padded:
    padded = make_padded(arrays=("ref_logprobs",))
    padded.values["label"] = labels
    return padded


@pytest.mark.parametrize("kl", [0.0, 0.8])
def test_equals_trl(kl: float) -> None:
    padded, beta = labelled(), 0.3
    ratios = padded.sums(padded.logprobs) - padded.sums(padded["ref_logprobs"])
    chosen, rejected = ratios[LABELS.bool()], ratios[~LABELS.bool()]
    losses = torch.cat(
        (
            2.0 * (1 - torch.sigmoid(beta * (chosen - kl))),
            0.5 * (1 - torch.sigmoid(beta * (kl - rejected))),
        )
    )
    options = {"beta": beta, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    metrics: dict[str, Tensor | float] = {
        "kl": kl,
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "logps/chosen": padded.sums(padded.logprobs)[LABELS.bool()].mean(),
    }
    check("kto", padded, losses.mean(), options, metrics, {"kl": kl})


def test_metrics_of_a_side_that_is_not_there_are_left_out() -> None:
    padded = labelled(torch.ones(6, dtype=DTYPE))
    made = merged([resolve_loss("kto", {})(as_input(padded, {"kl": 0.0})).metrics])
    found = {name: value for name, (value, _) in made.items()}
    assert "rewards/chosen" in found
    assert "rewards/rejected" not in found


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_the_baseline_is_a_kl_and_never_negative(shift: float) -> None:
    padded = make_padded(arrays=("ref_logprobs",))
    padded.arrays["ref_logprobs"] = padded.logprobs.detach() - shift
    loss = resolve_loss("kto", {})
    assert loss.loss.statistics is not None
    found = loss.loss.statistics(as_input(padded), loss.options)
    # Every token is `shift` likelier than under the reference.
    expected = max(0.0, shift * float((padded.mask != 0).sum(-1).double().mean()))
    assert found == {"kl": pytest.approx(expected)}
