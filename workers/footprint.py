"""What a run holds on a device, estimated from its model's files and its configuration (torch-free).

The pool adds it up before it puts a run beside others; the engine measures for itself. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from schemas.run_config import chosen_targets
from workers.model_folder import ModelEntry

KINDS = ("cpu", "cuda")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# With the scales that belong to the numbers.
_QUANTIZED_BYTES = {"nf4": 0.6, "int8": 1.1}
_MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "lion": 4}
# Of every trained number in float32: the master, what is accumulated, what an operation computes.
_STATE_BYTES = 4 + 4 + 4


@dataclass(frozen=True)
class Footprint:
    """In bytes: the base, which runs of the same `base` share; the run's own state, with the copy of it that
    a snapshot is written from; and the room in which an operation on its longest row works."""

    base: str
    base_bytes: int = 0
    own_bytes: int = 0
    work_bytes: int = 0


def precision(config: Mapping[str, Any], kind: str) -> str:
    """The number format of the base's weights on a device of this kind, by the name of its dtype."""
    if config.get("fp16"):
        return "float16"
    in_16_bits = kind == "cuda" if config["bf16"] is None else config["bf16"]
    return "bfloat16" if in_16_bits else "float32"


def footprints(model: ModelEntry, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By kind of device, as plain values."""
    return {kind: asdict(footprint(model, config, kind)) for kind in KINDS}


def footprint(model: ModelEntry, config: Mapping[str, Any], kind: str) -> Footprint:
    """On a device of this kind."""
    dtype, quantization = precision(config, kind), config.get("quantization")
    item = _ITEM_BYTES[dtype]
    embedded = model.vocab_size * model.hidden_size
    weights = (model.num_parameters - embedded) * _QUANTIZED_BYTES.get(quantization or "", item)
    return Footprint(
        f"{model.name} {dtype} {quantization or ''}".strip(),
        round(weights + embedded * item),
        _trained(model, config) * _bytes_per_number(config, item),
        config["max_seq_length"] * _activation_bytes(model, config, item),
    )


def _trained(model: ModelEntry, config: Mapping[str, Any]) -> int:
    rank = max([config["lora_r"], *(config.get("lora_rank_pattern") or {}).values()])
    if not config["lora_r"]:
        return model.num_parameters
    return model.adapter_parameters(rank, chosen_targets(config))


def _bytes_per_number(config: Mapping[str, Any], item: int) -> int:
    moments = _MOMENT_BYTES[config.get("optimizer", "adamw")]
    # The 16-bit copy that is computed with; master, moments and gradients of a snapshot.
    return _STATE_BYTES + moments + (item if item < 4 else 0) + 4 + moments + 4


def _activation_bytes(model: ModelEntry, config: Mapping[str, Any], item: int) -> int:
    """Of one token: what every linear layer takes and gives, a layer at a time with checkpointing; the
    embedding's width stands for the logits."""
    widths = sum(model.linear_widths.values())
    if config["gradient_checkpointing"]:
        head = model.vocab_size + model.hidden_size
        widths = head + max(0, widths - head) // model.num_layers
        widths += model.num_layers * model.hidden_size
    return item * widths
