"""Every kind of adapter: numbers equal peft's, the export loads in peft, states and refusals hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine import reference
from tests.unit.engine.support import gradient, make_rows
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.certificate import certificate
from workers.engine.dropout import Dropout, philox
from workers.engine.lora import LoraSpec
from workers.engine.random import philox as numpy_philox
from workers.engine.trainer import Trainer
from workers.text.rows import Row

# peft 0.21 asks transformers 5.23 by an old name, and warns where a tied head takes an adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]
ROWS = make_rows((9, 20, 5), seed=3)
KINDS: Mapping[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 6},
        "alpha_pattern": {"down_proj": 3.0},
    },
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora of some, patterned": {
        "dora": True,
        "target_modules": ("q_proj", "down_proj"),
        "rank_pattern": {"q_proj": 3},
    },
    "attention": {"train_mlp": False},
    "mlp": {"train_attn": False},
    "unembedding": {"train_unembed": True},
    "unembedding alone": {"target_modules": ("lm_head",)},
}


def _run(base: Base, noise: float = 0.05, **options: Any) -> Trainer:
    spec = LoraSpec(**{"r": 4, "alpha": 8.0, "seed": 1, **options})
    run = Trainer(base, spec, AdamWSettings(1e-2), gradient_checkpointing=False)
    master = run.adapter.master
    generator = torch.Generator().manual_seed(1)
    master += (noise * torch.randn(master.shape, generator=generator)).to(master)
    run.adapter.renew()
    return run


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def _peft(folder: Path, export: Path, run: Trainer) -> Any:
    """The exported adapter as peft loads it, in float64 and trainable."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run.export_adapter(export, "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = reference._plain_norm(module)
    loaded = PeftModel.from_pretrained(
        model, str(export), is_trainable=True, autocast_adapter_dtype=False
    )
    return loaded.double().eval()


def _by_name(model: Any, names: Any) -> torch.Tensor:
    """peft's gradients in the order of ours."""
    found = {
        name.replace(".default", "").removeprefix("base_model.model."): value
        for name, value in model.named_parameters()
    }
    keys = [name if name in found else f"{name}.weight" for name in names]
    return torch.cat([found[key].grad.reshape(-1) for key in keys])


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_export_equal_peft(
    tiny: Path, base64: Base, tmp_path: Path, kind: str, own: bool
) -> None:
    near = 1e-9 if own else 1e-6  # transformers' norms are float32
    base = base64 if own else load_base(tiny, dtype="float64", threads=1, own=False)
    run = _run(base, **KINDS[kind])
    found = run.forward_backward(ROWS, "cross_entropy", {})
    model = _peft(tiny, tmp_path / "adapter", run)
    loss, _ = reference.reference_loss(model, ROWS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert found["loss_sum"] == pytest.approx(loss.item(), rel=near)
    assert _distance(gradient(run), _by_name(model, run.adapter.tensors())) < near
    tokens = torch.arange(4, 16).unsqueeze(0)
    with torch.no_grad(), base.activated(run.adapter):
        ours = base.decoder.head.logits(base.decoder.hidden(tokens))
        assert torch.allclose(ours, model(input_ids=tokens).logits[0], rtol=0, atol=max(near, 1e-8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_its_state_goes_on(base: Base, kind: str) -> None:
    tokens = torch.arange(4, 24).unsqueeze(0)
    bare = base.decoder.hidden(tokens)
    first, second = (_run(base, noise=0.0, **KINDS[kind]) for _ in range(2))
    with base.activated(first.adapter):
        assert torch.allclose(base.decoder.hidden(tokens), bare, rtol=0, atol=1e-6)
    for _ in range(2):
        first.forward_backward(ROWS, "causal_lm", {})
        first.optim_step()
    first.forward_backward(ROWS, "causal_lm", {})
    second.restore(first.capture())
    for run in (first, second):
        run.optim_step()
        run.forward_backward(ROWS, "causal_lm", {})
    assert certificate(first.capture()) == certificate(second.capture())
    with pytest.raises(SignalError) as caught:
        _run(base, r=5).restore(first.capture())
    assert caught.value.code == "state_mismatch"


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_the_base_without_any_of_it(base64: Base, kind: str) -> None:
    """An adapter that has learnt nothing is no better than the base; one that has, differs."""
    rows = [
        Row(row.tokens, row.targets, row.weights, {}, {"chosen": float(number == 0)}, 0)
        for number, row in enumerate(ROWS[:2])
    ]
    fresh, other = _run(base64, noise=0.0, **KINDS[kind]), _run(base64, **KINDS[kind])
    found = fresh.forward_backward(rows, "dpo", {})
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-9)
    assert found["grad_norm"] > 0
    assert abs(other.forward_backward(rows, "dpo", {})["loss"] - math.log(2)) > 1e-6


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
def test_dropout_does_not_depend_on_packing(tiny: Path, own: bool) -> None:
    base = load_base(tiny, dtype="float64", threads=1, own=own)
    whole, parts, saving, other = (_run(base, dropout=0.3) for _ in range(4))
    saving.gradient_checkpointing = True
    plan = {"batches": [[[1], [0], [2]]], "kernel": base.decoder.kernel}
    apart = {"batches": [[[2]], [[0]], [[1]]], "kernel": "segments" if own else "padded"}
    first = whole.forward_backward(ROWS, "cross_entropy", {}, plan=plan, seq=7)
    second = parts.forward_backward(ROWS, "cross_entropy", {}, plan=apart, seq=7)
    saving.forward_backward(ROWS, "cross_entropy", {}, plan=plan, seq=7)
    other.forward_backward(ROWS, "cross_entropy", {}, plan=plan, seq=8)
    near = 1e-9 if own else 1e-6
    assert first["loss_sum"] == pytest.approx(second["loss_sum"], rel=near)
    assert _distance(gradient(whole), gradient(parts)) < near
    assert _distance(gradient(whole), gradient(saving)) < near
    assert _distance(gradient(whole), gradient(other)) > 1e-2
    # Sampling and evaluation drop nothing.
    tokens = torch.arange(4, 24).unsqueeze(0)
    plain = _run(base)
    with base.activated(whole.adapter):
        dropping = base.decoder.hidden(tokens)
    with base.activated(plain.adapter):
        assert torch.equal(base.decoder.hidden(tokens), dropping)


def test_dropout_has_its_derivative(base64: Base) -> None:
    """Against a difference quotient, in the direction of the gradient."""
    run = _run(base64, dropout=0.4)
    run.forward_backward(ROWS, "cross_entropy", {}, seq=3)
    slope = gradient(run)
    direction = slope / slope.norm()
    losses = []
    for step in (1e-5, -2e-5):
        run.adapter.master += step * direction
        run.adapter.renew()
        made = run.forward_backward(ROWS, "cross_entropy", {}, False, seq=3)
        losses.append(made["loss_sum"])
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(slope.norm()), rel=1e-6)


def test_masks_are_philox_and_drop_their_share() -> None:
    rows, places = torch.arange(64) % 7, torch.arange(64)
    mask = Dropout(0.25, 2**40 + 5, 2**35 + 9, rows, places).keep(12, 100)
    assert mask.shape == (64, 100)
    assert float(mask.double().mean()) == pytest.approx(0.75, abs=0.02)
    alone = Dropout(0.25, 2**40 + 5, 2**35 + 9, rows[5:6], places[5:6])
    assert torch.equal(alone.keep(12, 100)[0], mask[5])
    assert not torch.equal(alone.keep(13, 100)[0], mask[5])
    counter = torch.randint(0, 2**32, (4, 50))
    key = (0xDEADBEEF, 0x12345678)
    words = philox(tuple(counter), key)  # type: ignore[arg-type]
    expected = numpy_philox(counter.numpy().astype("uint64"), key)
    assert torch.stack(words).numpy().astype("uint64").tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["rslora", "dora", "unembedding"])
def test_16_bits_stay_near_float32(tiny: Path, base: Base, dtype: str, kind: str) -> None:
    coarse = load_base(tiny, dtype=dtype, threads=1)
    exact, rounded = _run(base, **KINDS[kind]), _run(coarse, **KINDS[kind])
    losses = [run.forward_backward(ROWS, "causal_lm", {})["loss"] for run in (exact, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert _distance(gradient(rounded), gradient(exact)) < 0.1
    before = rounded.adapter.master.clone()
    rounded.optim_step(learning_rate=1e-6)
    assert not torch.equal(before, rounded.adapter.master)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"target_modules": ("w_pack",)}, "lora_target_modules"),
        ({"r": 513}, "lora_rank_pattern"),
        ({"rank_pattern": {"w_pack": 2}}, "lora_rank_pattern.w_pack"),
        ({"alpha_pattern": {"proj": 2.0}}, "lora_alpha_pattern.proj"),
        ({"train_attn": False, "train_mlp": False}, "train_attn"),
        ({"dora": True, "dropout": 0.1}, "lora_dropout"),
        ({"train_unembed": True, "dropout": 0.1}, "lora_dropout"),
        ({"train_unembed": True, "dora": True}, "use_dora"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(
    base: Base, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(SignalError) as caught:
        _run(base, **options)
    assert (caught.value.code, caught.value.param) == ("validation_error", param)
