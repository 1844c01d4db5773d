"""Write an adapter as a plain PEFT folder: adapter_config.json and adapter_model.safetensors.

The configuration is written directly: importing peft for it takes seconds; a test holds the
folder to what peft itself loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from workers.engine.lora import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def export_adapter(adapter: Adapter, folder: Path, base_model_name: str) -> list[Path]:
    """Write both files into `folder` (made if missing) and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": tensor.cpu().contiguous()
        for name, tensor in adapter.tensors().items()
    }
    # Not by `save_file`: it hides the number of an error, so that a full disk could not be told from others.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = json.dumps(_config(adapter, base_model_name), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    return [folder / CONFIG, folder / WEIGHTS]


def _config(adapter: Adapter, base_model_name: str) -> dict[str, Any]:
    alpha = adapter.spec.alpha
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
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.spec.r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
