"""QLoRA and int8: what is kept is small, what is computed is exactly the restored weights' products."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import gradient, make_rows, make_trainer
from workers.engine import quantized
from workers.engine.base import Base, load_base
from workers.engine.info import fingerprint

ROWS = make_rows((9, 20, 5), seed=3)


@pytest.fixture
def library() -> Any:
    """bitsandbytes, which is optional."""
    return pytest.importorskip("bitsandbytes")


def _restored(tiny: Path, coarse: Base) -> Base:
    """A base of full layers with the weights that a quantized one restores."""
    base = load_base(tiny, dtype="float32", threads=1)
    for name, layer in base.decoder.layers.items():
        if name != "lm_head":
            layer.weight.data.copy_(coarse.decoder.layers[name].weight)
    return base


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
@pytest.mark.parametrize(("kind", "near"), [("nf4", 0.12), ("int8", 0.01)])
def test_a_quantized_base_computes_with_its_restored_weights(
    tiny: Path, base: Base, library: Any, kind: str, near: float, own: bool
) -> None:
    coarse = load_base(tiny, dtype="float32", threads=1, quantization=kind, own=own)
    for name, layer in coarse.decoder.layers.items():
        exact = base.decoder.layers[name].weight
        assert float((layer.weight - exact).norm() / exact.norm()) < near
    runs = [make_trainer(one) for one in (coarse, _restored(tiny, coarse))]
    first, second = (run.forward_backward(ROWS, "causal_lm", {}) for run in runs)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    one, two = (gradient(run) for run in runs)
    assert float((one - two).norm() / two.norm()) < 1e-4
    assert coarse.decoder.num_parameters == base.decoder.num_parameters
    assert fingerprint(coarse)["quantization"].startswith(kind)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_of_a_quantized_layer_take_few_bytes(library: Any, kind: str) -> None:
    weight = torch.randn(256, 512)
    layer = quantized.linear_class(kind)(weight, None, quantized_slot(), 0)
    held = sum(
        value.numel() * value.element_size()
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    )
    assert held <= weight.numel() * (0.6 if kind == "nf4" else 1.1)
    assert not list(layer.parameters())


def quantized_slot() -> Any:
    """A slot without an adapter."""
    from workers.engine.linear import Slot

    return Slot()


def test_dora_and_training_work_on_a_quantized_base(tiny: Path, library: Any) -> None:
    from workers.engine.adamw import AdamWSettings
    from workers.engine.lora import LoraSpec
    from workers.engine.trainer import Trainer

    base = load_base(tiny, dtype="bfloat16", threads=1, quantization="nf4")
    run = Trainer(base, LoraSpec(r=4, dora=True), AdamWSettings(2e-2), optimizer="adamw_8bit")
    losses = []
    for _ in range(10):
        losses.append(run.forward_backward(ROWS, "causal_lm", {})["loss"])
        run.optim_step()
    assert losses[-1] < losses[0]


def test_it_is_refused_with_the_reason(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized._library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(SignalError, match="not installed") as caught:
            load_base(tiny, quantization="nf4")
    assert (caught.value.code, caught.value.param) == ("not_supported", "quantization")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SignalError, match="float64"):
        load_base(tiny, dtype="float64", quantization="int8")
