"""What a run is estimated to hold: the base once, its own state by rank and optimizer, by kind of device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.footprint import footprint, footprints, precision
from workers.model_folder import ModelEntry, read_model_folder

CONFIG: dict[str, Any] = {
    "lora_r": 8,
    "lora_target_modules": ["q_proj"],
    "bf16": None,
    "max_seq_length": 100,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelEntry:
    return read_model_folder("tiny", tiny_model)


@pytest.mark.parametrize(
    ("config", "cpu", "cuda"),
    [
        ({"bf16": None}, "float32", "bfloat16"),
        ({"bf16": True}, "bfloat16", "bfloat16"),
        ({"bf16": False}, "float32", "float32"),
        ({"bf16": None, "fp16": True}, "float16", "float16"),
    ],
)
def test_the_format_of_the_base(config: dict[str, Any], cpu: str, cuda: str) -> None:
    assert (precision(config, "cpu"), precision(config, "cuda")) == (cpu, cuda)


def test_the_base_is_named_by_all_that_tells_bases_apart(model: ModelEntry) -> None:
    found = footprints(model, CONFIG)
    assert (found["cpu"]["base"], found["cuda"]["base"]) == ("tiny float32", "tiny bfloat16")
    quantized = footprint(model, {**CONFIG, "quantization": "nf4"}, "cuda")
    assert quantized.base == "tiny bfloat16 nf4"
    assert quantized.base_bytes < found["cuda"]["base_bytes"] < found["cpu"]["base_bytes"]
    assert found["cpu"]["base_bytes"] == 4 * model.num_parameters


def test_the_state_grows_with_what_is_trained(model: ModelEntry) -> None:
    def own(**changes: Any) -> int:
        return footprint(model, {**CONFIG, **changes}, "cpu").own_bytes

    # Two layers, 64 in and 64 out; master, moments, three gradients' worth, and a snapshot's copy.
    assert own() == 8 * 2 * 128 * (12 + 8 + 16)
    assert own(lora_r=16) == 2 * own() == own(lora_rank_pattern={"q_proj": 16})
    assert own(optimizer="lion") < own()
    assert own(lora_target_modules=None) > own()
    assert own(lora_r=0, lora_target_modules=None) > 4 * model.num_parameters


def test_the_room_to_work_in_is_that_of_the_longest_row(model: ModelEntry) -> None:
    short = footprint(model, CONFIG, "cpu").work_bytes
    assert footprint(model, {**CONFIG, "max_seq_length": 200}, "cpu").work_bytes == 2 * short
    assert footprint(model, {**CONFIG, "gradient_checkpointing": True}, "cpu").work_bytes < short
