"""Facts for answers and manifests: versions, the fingerprint of a computation, the size of a model.

`versions` imports nothing heavy, so the torch-free parts may call it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.canonical import digest
from workers.engine import ENGINE

if TYPE_CHECKING:
    from workers.engine.base import Base
    from workers.engine.trainer import Trainer

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "bitsandbytes")


def versions() -> dict[str, str]:
    """Python's version and that of each package whose code makes the numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    # Read from files: milliseconds, and every snapshot names them.
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(base: Base) -> dict[str, Any]:
    """What must be equal for two computations to be compared bit by bit, and whether it suffices.

    `deterministic` false means that even then bits may differ; `why_not` says what is in the way.
    """
    import torch

    from workers.engine.determinism import why_not

    cuda = base.device.type == "cuda"
    reason = why_not(base.device)
    return {
        "engine": ENGINE,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(base.device) if cuda else _processor(),
        "instructions": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": base.dtype_name,
        "quantization": _quantization(base),
        "decoder": _decoder(base),
        "kernels": _cuda_kernels() if cuda else _cpu_kernels(),
        "deterministic": reason is None,
        "why_not": reason,
    }


def fingerprint_id(fingerprint: Mapping[str, Any]) -> str:
    """A short name of a fingerprint: 12 hex digits, equal where all its fields are."""
    return digest(fingerprint)[:12]


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


def _decoder(base: Base) -> str:
    """Ours by name; transformers' code makes the numbers of every other, so its version counts."""
    name = type(base.decoder).__name__.lower()
    return name if name == "llama" else f"{name} {metadata.version('transformers')}"


def _quantization(base: Base) -> str | None:
    """The kind, with the version of the code that restores the weights."""
    if base.quantization is None:
        return None
    return f"{base.quantization} {metadata.version('bitsandbytes')}"


def _cpu_kernels() -> str:
    import torch

    found = re.findall(r"(Math Kernel Library|MKL-DNN)\D*([\d.]+)", torch.__config__.show())
    names = {"Math Kernel Library": "mkl", "MKL-DNN": "onednn"}
    return ", ".join(f"{names[name]} {version}" for name, version in found) or "torch"


def _cuda_kernels() -> str:
    """cuDNN and the driver, which compiles what torch's binaries do not hold for the device."""
    import torch

    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        driver = ""
    found = re.search(r"Kernel Module\D*([\d.]+)", driver)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return f"cudnn {cudnn}, driver {found[1] if found else 'unknown'}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
