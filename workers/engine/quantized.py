"""Linear layers whose frozen weight is kept in 4 or 8 bits by bitsandbytes and restored for each product.

"nf4" is QLoRA's format (Dettmers et al., arXiv 2305.14314), blocks of 64 numbers with a scale that is itself
quantized; "int8" keeps a scale per row. Only the weight is coarse: products are those of the base's dtype, so
the same weight gives the same numbers in training, sampling and both decoders.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from schemas.errors import SignalError
from workers.engine.linear import LoraLinear

KINDS = ("nf4", "int8")


class _QuantizedLinear(LoraLinear):
    """Restores its weight whenever it is asked for; nothing of it is kept between two products."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[out, in] in the base's dtype."""
        raise NotImplementedError

    @property
    def weight_t(self) -> Tensor:
        """See LoraLinear.weight_t; not kept."""
        return self.weight.t()  # type: ignore[no-any-return]

    def plain(self, x: Tensor) -> Tensor:
        """See LoraLinear.plain."""
        made: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return made


class Nf4Linear(_QuantizedLinear):
    """4 bits."""

    def hold(self, weight: Tensor) -> None:
        """See LoraLinear.hold."""
        data = weight.detach().contiguous()
        self._packed, self._how = _library().quantize_4bit(
            data, quant_type="nf4", compress_statistics=True
        )

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """See _QuantizedLinear.weight."""
        return _library().dequantize_4bit(self._packed, self._how)


class Int8Linear(_QuantizedLinear):
    """8 bits."""

    def hold(self, weight: Tensor) -> None:
        """See LoraLinear.hold."""
        self._packed, self._scales, _ = _library().int8_vectorwise_quant(
            weight.detach().to(torch.float16)
        )

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """See _QuantizedLinear.weight."""
        return (self._packed * (self._scales.unsqueeze(1) / 127)).to(self.dtype)


class _Product(torch.autograd.Function):
    """x W^T whose backward restores the weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] @ ctx.layer.weight, None


def linear_class(kind: str | None) -> type[LoraLinear]:
    """The class of a base's linear layers. Raises SignalError not_supported with the reason."""
    if kind is None:
        return LoraLinear
    _library()
    return {"nf4": Nf4Linear, "int8": Int8Linear}[kind]


def check_quantization(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises SignalError not_supported unless a weight can be kept and restored here."""
    if dtype == torch.float64:
        raise _refused("it has no float64")
    try:
        from workers.engine.linear import Slot

        trial = torch.ones(64, 64, dtype=dtype, device=device)
        linear_class(kind)(trial, None, Slot(), 0).plain(trial)
    except SignalError:
        raise
    except Exception as error:
        # bitsandbytes raises whatever its backend for the device does.
        raise _refused(f"it does not run on {device} in {dtype}: {error}") from error


@cache
def _library() -> Any:
    try:
        from bitsandbytes import functional as library
    except ImportError as error:
        raise _refused("the package bitsandbytes is not installed on the worker") from error
    return library


def _refused(reason: str) -> SignalError:
    return SignalError(
        "not_supported", f"The quantization cannot be used: {reason}.", param="quantization"
    )
