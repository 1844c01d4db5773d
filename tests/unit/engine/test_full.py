"""All parameters: numbers equal plain transformers', the export loads there, states go on, refusals hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine import reference
from tests.unit.engine.support import gradient, make_rows, make_trainer
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.certificate import certificate
from workers.engine.export import import_adapter
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.session.tensor_file import read_tensors
from workers.text.rows import Row

ROWS = make_rows((9, 20, 5), seed=3)


def _run(folder: Path, dtype: str = "float64", *, checkpoint: bool = False) -> Trainer:
    base = load_base(folder, dtype=dtype, threads=1, own=False)
    return Trainer(base, LoraSpec(r=0), AdamWSettings(1e-3), gradient_checkpointing=checkpoint)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_equals_transformers(tiny: Path, tmp_path: Path, checkpoint: bool) -> None:
    from transformers import AutoModelForCausalLM

    run = _run(tiny, checkpoint=checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    assert run.num_trainable_parameters == sum(p.numel() for p in model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = reference.reference_loss(model, ROWS)
        loss.backward()  # type: ignore[no-untyped-call]
        found = run.forward_backward(ROWS, "cross_entropy", {})
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert found["loss_sum"] == pytest.approx(loss.item(), rel=1e-6)
        assert float((gradient(run) - expected).norm() / expected.norm()) < 1e-5
        optimizer.step()
        run.optim_step()
    run.export_adapter(tmp_path, "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = torch.arange(4, 16).unsqueeze(0)
    with torch.no_grad():
        ours = run.base.decoder.head.logits(run.base.decoder.hidden(tokens))
        assert torch.allclose(ours, loaded(input_ids=tokens).logits[0], atol=1e-6)


def test_a_state_goes_on_and_an_export_is_taken_back(tiny: Path, tmp_path: Path) -> None:
    first, second = _run(tiny, "bfloat16"), _run(tiny, "bfloat16")
    first.forward_backward(ROWS, "causal_lm", {})
    first.optim_step()
    second.restore(first.capture())
    for run in (first, second):
        run.forward_backward(ROWS, "causal_lm", {})
    assert certificate(first.capture()) == certificate(second.capture())
    _, weights = first.export_adapter(tmp_path, "tiny")
    taken = import_adapter(first.adapter, {}, read_tensors(weights.read_bytes())[0])
    assert torch.equal(taken, first.adapter.master)


def test_a_reference_must_be_given(tiny: Path) -> None:
    run = _run(tiny)
    rows = [
        Row(row.tokens, row.targets, row.weights, {}, {"chosen": float(number == 0)}, 0)
        for number, row in enumerate(ROWS[:2])
    ]
    with pytest.raises(SignalError, match="ref_logprobs") as caught:
        run.forward_backward(rows, "dpo", {})
    assert caught.value.code == "not_supported" and run.accumulated == 0
    known = [
        Row(row.tokens, row.targets, row.weights, {}, {**row.values, "ref_logps": -3.0}, 0)
        for row in rows
    ]
    run.forward_backward(known, "dpo", {})
    assert run.accumulated == 1 and gradient(run).any()


def test_what_it_cannot_do_is_refused(tiny: Path, base: Base) -> None:
    run = _run(tiny, "float32")
    with pytest.raises(SignalError, match="ref_logprobs"), run.base.activated(None):
        pass
    for other in (run.base, base):
        with pytest.raises(SignalError) as caught:
            Trainer(other, LoraSpec(r=0), AdamWSettings())
        assert (caught.value.code, caught.value.param) == ("not_supported", "lora_r")
    with pytest.raises(SignalError) as caught:
        run.restore(make_trainer(base).capture())
    assert caught.value.code == "state_mismatch"
