"""An adapter as a plain PEFT folder, adapter_config.json and adapter_model.safetensors: out and in.

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
from workers.engine.state import check_facts, mismatch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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


def export_adapter(adapter: Adapter, folder: Path, base_model_name: str) -> list[Path]:
    """Write both files into `folder` (made if missing) and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in adapter.tensors().items()
    }
    # Not by `save_file`: it hides the number of an error, so that a full disk could not be told from others.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = json.dumps(_config(adapter, base_model_name), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    return [folder / CONFIG, folder / WEIGHTS]


def import_adapter(
    adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Tensor:
    """The master weights [P] of `adapter` from the content of such a folder, bit for bit.

    Raises SignalError state_mismatch that names the field or the tensor which is not `adapter`'s.
    """
    own = _config(adapter, "")
    expected = {name: own[name] for name in _MEANING}
    found = {name: config[name] for name in _MEANING if name in config}
    if isinstance(found.get("target_modules"), list):
        found["target_modules"] = sorted(found["target_modules"])
    expected["target_modules"] = sorted(expected["target_modules"])
    check_facts(found, expected, CONFIG)
    for name in tensors:
        if not name.startswith(_PREFIX):
            raise mismatch(f"the tensor {name} is unknown")
    return adapter.flat({name.removeprefix(_PREFIX): value for name, value in tensors.items()})


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
