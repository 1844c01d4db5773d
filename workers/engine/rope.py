"""Rotary position tables (Su et al., arXiv 2104.09864), with Llama 3's stretching of long wavelengths.

Tables are computed in float32 whatever the model's dtype, as transformers does, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TYPES = frozenset({"default", "linear", "llama3"})


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; before it rope_theta and rope_scaling.
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.pop("type", "default"))
    return found


def supports_rope(config: Mapping[str, Any]) -> bool:
    """Whether the config's kind of rotary embedding is one of ours."""
    parameters = _parameters(config)
    return parameters["rope_type"] in _TYPES and parameters.get("partial_rotary_factor", 1.0) == 1.0


def head_dim(config: Mapping[str, Any]) -> int:
    """Size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def inverse_frequencies(config: Mapping[str, Any], size: int) -> Tensor:
    """[size / 2] angular frequencies per position, float32."""
    parameters = _parameters(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    plain = torch.pow(float(parameters["rope_theta"]), exponents).reciprocal()
    if parameters["rope_type"] == "linear":
        return plain / float(parameters["factor"])
    if parameters["rope_type"] == "llama3":
        return _llama3(plain, parameters)
    return plain


def _llama3(plain: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    factor, old = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / plain
    # 0 for wavelengths that are stretched in full, 1 for those that stay.
    blend = ((old / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


class Rope:
    """cos and sin of every position, each [.., positions, 1, size], sin with its first half negated."""

    def __init__(self, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        """Tables grow on demand up to the longest sequence asked for."""
        self._frequencies = inverse_frequencies(config, head_dim(config)).to(device)
        self._dtype = dtype
        self._cos, self._sin = self._tables(256)

    def first(self, length: int) -> tuple[Tensor, Tensor]:
        """Positions 0 to length - 1, shape [1, length, 1, size]."""
        self._grow(length)
        return self._cos[:, :length], self._sin[:, :length]

    def at(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The given positions [N], all below `length`, shape [N, 1, size]."""
        self._grow(length)
        return self._cos[0].index_select(0, positions), self._sin[0].index_select(0, positions)

    def _grow(self, length: int) -> None:
        if length > self._cos.shape[1]:
            self._cos, self._sin = self._tables(1 << (length - 1).bit_length())

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        angles = (
            torch.arange(length, device=self._frequencies.device).float()[:, None]
            * self._frequencies
        )
        shape = (1, length, 1, -1)
        cos, sin = angles.cos(), angles.sin()
        tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return tables[0].to(self._dtype).view(shape), tables[1].to(self._dtype).view(shape)
