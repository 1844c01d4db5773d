"""Facts for answers and manifests: versions, the fingerprint of a computation, the size of a model.

`versions` imports nothing heavy, so the torch-free parts may call it.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.engine.base import Base
    from workers.engine.trainer import Trainer

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python's version and that of each package whose code makes the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(base: Base) -> dict[str, Any]:
    """What must be equal for two computations to be compared bit by bit."""
    import torch

    cuda = base.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(base.device) if cuda else _processor(),
        "instructions": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": base.dtype_name,
        "decoder": type(base.decoder).__name__.lower(),
    }


def model_facts(trainer: Trainer) -> dict[str, Any]:
    """The sizes of a run's model; counts are numbers, not bytes."""
    base = trainer.base
    config = base.config
    return {
        "architecture": (config.get("architectures") or [config.get("model_type", "unknown")])[0],
        "num_parameters": base.decoder.num_parameters,
        "num_trainable_parameters": trainer.num_trainable_parameters,
        "hidden_size": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_attention_heads": config.get("num_attention_heads"),
        "vocab_size": base.vocab_size,
        "max_position_embeddings": base.context_length,
        "dtype": base.dtype_name,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
