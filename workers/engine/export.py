"""An adapter as a plain PEFT folder, adapter_config.json and adapter_model.safetensors: out and in; and all
parameters of a model as config.json and model.safetensors, which transformers loads.

The configuration is written directly: importing peft for it takes seconds; a test holds the
folder to what peft itself loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from workers.engine.lora import Adapter
from workers.engine.parameters import Parameters
from workers.engine.state import check_facts, dtype_name, mismatch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
_PREFIX = "base_model.model."
# What the weights mean; the other fields say where they came from or how to begin.
_MEANING = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "use_dora",
    "use_rslora",
)


def file_names(parameters: Parameters) -> tuple[str, str]:
    """The configuration and the weights of an export: a PEFT adapter's, or a whole model's."""
    return (CONFIG, WEIGHTS) if isinstance(parameters, Adapter) else (MODEL_CONFIG, MODEL_WEIGHTS)


def export_adapter(parameters: Parameters, folder: Path, base_model_name: str) -> list[Path]:
    """Write both files into `folder` (made if missing) and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(parameters)
    prefix = _PREFIX if isinstance(parameters, Adapter) else ""
    tensors = {
        f"{prefix}{name}": tensor.cpu().contiguous()
        for name, tensor in parameters.tensors().items()
    }
    # Not by `save_file`: it hides the number of an error, so that a full disk could not be told from others.
    (folder / names[1]).write_bytes(save(tensors, metadata={"format": "pt"}))
    described = _described(parameters, base_model_name)
    config = json.dumps(described, indent=2, sort_keys=True)
    (folder / names[0]).write_text(config + "\n", encoding="utf-8")
    return [folder / name for name in names]


def import_adapter(
    parameters: Parameters, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Tensor:
    """The master weights [P] of `parameters` from the content of such a folder, bit for bit.

    Raises SignalError state_mismatch that names the field or the tensor which is not theirs.
    """
    if not isinstance(parameters, Adapter):
        return parameters.flat(tensors)
    own = _config(parameters, "")
    expected = {name: own[name] for name in _MEANING}
    found = {name: config[name] for name in _MEANING if name in config}
    if isinstance(found.get("target_modules"), list):
        found["target_modules"] = sorted(found["target_modules"])
    expected["target_modules"] = sorted(expected["target_modules"])
    check_facts(found, expected, CONFIG)
    for name in tensors:
        if not name.startswith(_PREFIX):
            raise mismatch(f"the tensor {name} is unknown")
    return parameters.flat({name.removeprefix(_PREFIX): value for name, value in tensors.items()})


def _described(parameters: Parameters, base_model_name: str) -> dict[str, Any]:
    if isinstance(parameters, Adapter):
        return _config(parameters, base_model_name)
    # The model's own config.json, with the number format that the weights are written in.
    kept = {name: value for name, value in parameters.config.items() if name != "torch_dtype"}
    return {**kept, "dtype": dtype_name(parameters.master.dtype)}


def _config(adapter: Adapter, base_model_name: str) -> dict[str, Any]:
    spec = adapter.spec
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(spec.alpha),
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.r,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: _number(alpha) for key, alpha in spec.alpha_pattern.items()},
        "revision": None,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.dora,
        "use_rslora": spec.rslora,
    }


def _number(alpha: float) -> float:
    """Whole numbers as such, as peft writes them."""
    return int(alpha) if float(alpha).is_integer() else alpha
