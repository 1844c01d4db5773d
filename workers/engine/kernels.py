"""The parts of a transformer layer with their derivatives written out, outside of autograd.

Base weights, gains and rotary tables are frozen: only the derivatives by inputs and by adapters are
needed, and most of what autograd would record is not. N positions, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.lora import LoraLinear, Pair


def linear(
    x: Tensor, layer: LoraLinear, pair: Pair | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`residual` + base(x) + adapter(x) for `x` [N, I] -> [N, O]; and x @ A.T [N, R] for the backward."""
    start = layer.bias if residual is None else residual
    y = torch.mm(x, layer.weight_t) if start is None else torch.addmm(start, x, layer.weight_t)
    if residual is not None and layer.bias is not None:
        y += layer.bias
    if pair is None:
        return y, None
    low = torch.mm(x, pair[0].t())
    return y.addmm_(low, pair[1].t(), alpha=layer.slot.scale), low


def linear_by_input(
    slope: Tensor, by_low: Tensor | None, layer: LoraLinear, pair: Pair | None, into: Tensor | None
) -> Tensor:
    """The derivative by x, added to `into` in place; `by_low` is slope @ B."""
    by_x = torch.mm(slope, layer.weight) if into is None else into.addmm_(slope, layer.weight)
    if pair is None or by_low is None:
        return by_x
    return by_x.addmm_(by_low, pair[0], alpha=layer.slot.scale)


def scaled_product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale * first @ second, the scaling inside of the product."""
    out = first.new_empty(first.shape[0], second.shape[1])
    return torch.addmm(out, first, second, beta=0, alpha=scale, out=out)


def rms_norm(x: Tensor, gain: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """gain * x / sqrt(mean(x^2) + eps) over the last dimension, inside in float32 at least; what is kept.

    `eps` is a scalar tensor: a Python number would be made one at each call.
    """
    wide = x.to(eps.dtype)
    total = (wide * wide).sum(-1, keepdim=True)
    scale = torch.add(eps, total, alpha=1.0 / x.shape[-1]).rsqrt_()
    normed = wide * scale
    return gain * normed.to(x.dtype), (normed, scale)


def rms_norm_backward(slope: Tensor, gain: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """The derivative by x."""
    normed, scale = kept
    by_normed = (slope * gain).to(normed.dtype)
    total = (by_normed * normed).sum(-1, keepdim=True)
    by_normed.addcmul_(normed, total, value=-1.0 / normed.shape[-1])
    return by_normed.mul_(scale).to(slope.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate heads `x` [.., heads, size] by tables [.., 1, size]: halves (a, b) become
    (a cos - b sin, b cos + a sin). `sin` holds -sin in its first half; `back` rotates the other way."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(swapped, sin, value=-1 if back else 1)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate).mul_(up)


def silu_gate_backward(slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives by gate and by up."""
    by_gate = torch.ops.aten.silu_backward.default(slope * up, gate)
    return by_gate, torch.nn.functional.silu(gate).mul_(slope)
