"""An exported adapter is a plain PEFT folder: real peft loads it and computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.engine.support import make_rows, make_trainer
from workers.engine.base import Base
from workers.engine.info import fingerprint, model_facts, versions

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("targets", [None, ("v_proj", "down_proj")])
def test_peft_loads_the_folder_and_gives_the_same_logits(
    base: Base, tiny: Path, tmp_path: Path, targets: tuple[str, ...] | None
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_trainer(base, targets=targets, r=3, alpha=7.5)
    run.forward_backward(make_rows((9, 4)), "causal_lm", {}, True)
    run.optim_step()
    files = run.export_adapter(tmp_path / "out", "acme/tiny")
    assert sorted(file.name for file in files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")
    tokens = torch.arange(10, 40).unsqueeze(0)
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits[0]
        with base.activated(run.adapter):
            ours = base.decoder.head.logits(base.decoder.hidden(tokens))
    assert torch.allclose(ours, theirs, atol=1e-4)
    loaded = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert loaded == run.num_trainable_parameters


def test_the_config_has_only_fields_that_peft_knows(base: Base, tmp_path: Path) -> None:
    from dataclasses import fields

    from peft import LoraConfig

    make_trainer(base).export_adapter(tmp_path, "acme/tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= {field.name for field in fields(LoraConfig)}
    assert config["base_model_name_or_path"] == "acme/tiny"
    loaded = LoraConfig.from_pretrained(str(tmp_path))
    assert (loaded.r, loaded.lora_alpha, loaded.peft_type.value) == (4, 8, "LORA")
    assert loaded.target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_facts_of_a_run(base: Base) -> None:
    run = make_trainer(base, targets=("q_proj",))
    facts = model_facts(run)
    assert facts["num_trainable_parameters"] == 2 * (4 * 64 + 64 * 4)
    assert (
        facts["num_parameters"]
        == 512 * 64 + 2 * (3 * 128 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 128) + 64
    )
    assert facts["architecture"] == "LlamaForCausalLM" and facts["dtype"] == "float32"
    print_ = fingerprint(base)
    assert print_["threads"] == 1 and print_["torch"] == torch.__version__ and print_["device"]
    assert {"python", "torch", "safetensors"} <= set(versions())
    json.dumps([facts, print_])
