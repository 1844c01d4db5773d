"""The tensors of a model folder, read one at a time from memory-mapped safetensors.

A tensor that is already in the wanted format on the CPU is a view of the file; every other is converted by
itself, so that the host never holds a model twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# A buffer that old checkpoints carry and every model derives from its config.
_DERIVED = "rotary_emb.inv_freq"


class FolderTensors(Mapping[str, Tensor]):
    """By name, in `dtype` on `device`; each access reads."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Opens every *.safetensors of `folder`."""
        self._dtype, self._device = dtype, device
        self._files: dict[str, Any] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            file = safe_open(shard, framework="pt")
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                if not name.endswith(_DERIVED):
                    self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.to(device=self._device, dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
