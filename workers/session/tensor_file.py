"""Safetensors files written as a stream: no copy of the tensors, hashed on the way.

safetensors' own writer copies every tensor twice and hides the number of an error, so that a full disk
could not be told from others. Reading is left to safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from workers.engine.state import raw

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_METADATA = "__metadata__"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write tensors that lie on the CPU; the file's name, size and sha256 as manifests hold them."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    pieces: list[bytes | memoryview] = [_header(ordered, metadata)]
    pieces += [raw(tensor) for _, tensor in ordered]
    hashed = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            hashed.update(piece)
            file.write(piece)
        size = file.tell()
    return {"path": path.name, "size_bytes": size, "sha256": hashed.hexdigest()}


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file's bytes. Raises ValueError when it is none."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    length = int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8 : 8 + length]).get(_METADATA, {})


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
