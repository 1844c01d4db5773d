"""Safetensors as a stream: what safetensors itself reads, and what it writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from workers.session.tensor_file import read_tensors, write_tensors

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "a.b": torch.tensor([1.5, -0.0, float("inf")]),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "fp16": torch.arange(3, dtype=torch.float16),
    "bytes": torch.tensor([1, 255, 7], dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "one": torch.tensor(9),
    "small": torch.tensor([-1, 2], dtype=torch.int8),
    "none": torch.zeros(0, 4),
    "ints": torch.tensor([[1], [2]], dtype=torch.int32),
}


def _same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in TENSORS.items()
    )


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    entry = write_tensors(path, TENSORS, {"format": "pt", "who": "ä"})
    data = path.read_bytes()
    assert entry == {
        "path": "t.safetensors", "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert _same(load_file(path))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "ä"}
    tensors, metadata = read_tensors(data)
    assert _same(tensors) and metadata == {"format": "pt", "who": "ä"}


def test_what_safetensors_writes_is_read() -> None:
    tensors, metadata = read_tensors(save(TENSORS))
    assert _same(tensors) and metadata == {}


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "f", TENSORS, {})
    second = write_tensors(tmp_path / "f", dict(reversed(TENSORS.items())), {})
    assert first == second


@pytest.mark.parametrize("data", [b"", b"1234567", bytes(100), b"\xff" * 100])
def test_what_is_no_such_file_is_said(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_tensors(data)
