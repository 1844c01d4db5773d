"""forward: log-probabilities and likeliest tokens against transformers, and the shape of the answer."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.errors import SignalError
from tests.unit.engine import reference
from tests.unit.engine.support import make_row, make_rows, make_trainer, same, state
from workers.engine import logprob
from workers.engine.base import Base
from workers.text.rows import Row

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def logprobs_of(model: Any, row: Row) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(list(row.tokens)).unsqueeze(0)).logits[0]
    found: Tensor = logits.log_softmax(-1)
    return found


@pytest.mark.parametrize("chunk", [600, 1 << 24])
def test_equals_transformers(
    tiny: Path, base64: Base, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", chunk)
    trainer, rows = make_trainer(base64), make_rows((7, 3, 12), seed=2)
    model = reference.reference_model(tiny, trainer, torch.float64)
    before = state(trainer)
    found = trainer.forward(rows, top_k=4)
    assert same(before, state(trainer))
    assert found["metrics"]["num_tokens"] == sum(
        map(bool, (w for row in rows for w in row.weights))
    )
    for answer, row in zip(found["rows"], rows, strict=True):
        expected = logprobs_of(model, row)
        assert (answer["token_ids"], answer["target_ids"]) == (list(row.tokens), list(row.targets))
        for place, weight in enumerate(row.weights):
            if not weight:
                assert answer["logprobs"][place] is answer["top_logprobs"][place] is None
                continue
            own = float(expected[place, row.targets[place]])
            best = expected[place].topk(4)
            assert answer["logprobs"][place] == pytest.approx(own, rel=1e-9)
            assert answer["top_logprobs"][place] == pytest.approx(best.values.tolist(), rel=1e-9)
            assert answer["top_token_ids"][place] == best.indices.tolist()


def test_several_targets_per_position(base64: Base) -> None:
    trainer, plain = make_trainer(base64), make_row(3, 1)
    first = trainer.forward([plain])["rows"][0]["logprobs"]
    targets = [number for target in plain.targets for number in (target, 5)]
    wide = Row(plain.tokens, array("i", targets), array("f", [1, 1, 1, 0, 0, 0]), example=9)
    (found,) = trainer.forward([wide], top_k=2)["rows"]
    assert found["target_ids"] == [[target, 5] for target in plain.targets]
    assert found["logprobs"][0][0] == pytest.approx(first[0], rel=1e-12)
    assert found["logprobs"][1] == [pytest.approx(first[1], rel=1e-12), None]
    assert found["logprobs"][2] == [None, None]
    assert [len(top or ()) for top in found["top_token_ids"]] == [2, 2, 0]
    assert found["example"] == 9


def test_the_gradient_of_a_loss_of_these_is_the_losss_own(base64: Base) -> None:
    """The two passes of a custom loss, with plain torch as the client."""
    own, known = make_trainer(base64), make_trainer(base64)
    rows = make_rows((6, 9), seed=4)
    answers = own.forward(rows)["rows"]
    back = []
    for row, answer in zip(rows, answers, strict=True):
        logprobs = torch.tensor([one or 0.0 for one in answer["logprobs"]], requires_grad=True)
        loss = -(logprobs * torch.tensor(list(row.weights))).sum()
        (slope,) = torch.autograd.grad(loss, logprobs)
        back.append(Row(row.tokens, row.targets, array("f", slope.tolist())))
    first = own.forward_backward(back, "custom", {})
    second = known.forward_backward(rows, "cross_entropy", {})
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-12)


def test_nothing_wanted_is_nothing_computed(base: Base) -> None:
    (found,) = make_trainer(base).forward([make_row(2, 1, [0.0, 0.0])], top_k=3)["rows"]
    assert found["logprobs"] == found["top_logprobs"] == [None, None]


def test_what_the_model_cannot_take_is_refused(base: Base) -> None:
    wrong = make_row(5, 1)
    wrong.tokens[2] = 512  # type: ignore[index]
    with pytest.raises(SignalError) as caught:
        make_trainer(base).forward([make_row(3), wrong])
    assert (caught.value.code, caught.value.param) == (
        "token_out_of_range",
        "batch_data.1.tokens",
    )


def test_logits_that_are_not_finite_name_the_example(base: Base) -> None:
    trainer = make_trainer(base)
    trainer.adapter.master.fill_(float("nan"))
    trainer.adapter.renew()
    with pytest.raises(SignalError) as caught:
        trainer.forward([make_row(3)])
    assert (caught.value.code, caught.value.param) == ("non_finite", "batch_data.0")
