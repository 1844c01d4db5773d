"""The parts of a transformer layer with their derivatives written out, outside of autograd.

Base weights, gains and rotary tables are frozen: only the derivatives by inputs and by adapters are
needed, and most of what autograd would record is not. N positions, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.engine.dropout import Dropout
from workers.engine.linear import LoraLinear, Term


class Kept(NamedTuple):
    """What the backward of an adapter needs: its input [N, I] before dropout, x @ A.T [N, R], the mask of
    what is kept [N, I], and with DoRA the sum [N, O] before it is brought to its length."""

    x: Tensor
    low: Tensor
    keep: Tensor | None
    product: Tensor | None


def linear(
    x: Tensor,
    layer: LoraLinear,
    term: Term | None,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Kept | None]:
    """`residual` + base(x) + adapter(x) for `x` [N, I] -> [N, O], and what its backward needs."""
    if term is not None and term.ratio is not None:
        return _scaled_linear(x, layer, term, term.ratio, residual)
    start = layer.bias if residual is None else residual
    y = torch.mm(x, layer.weight_t) if start is None else torch.addmm(start, x, layer.weight_t)
    if residual is not None and layer.bias is not None:
        y += layer.bias
    if term is None:
        return y, None
    keep = None if dropout is None else dropout.keep(layer.index, layer.in_features)
    low = torch.mm(_dropped(x, keep, dropout), term.a.t())
    return y.addmm_(low, term.b.t(), alpha=term.scale), Kept(x, low, keep, None)


def _scaled_linear(
    x: Tensor, layer: LoraLinear, term: Term, ratio: Tensor, residual: Tensor | None
) -> tuple[Tensor, Kept | None]:
    """The same with DoRA, whose `ratio` [O] scales the sum."""
    low = torch.mm(x, term.a.t())
    product = torch.mm(x, layer.weight_t).addmm_(low, term.b.t(), alpha=term.scale)
    y = (product * ratio).to(x.dtype)
    if layer.bias is not None:
        y += layer.bias
    if residual is not None:
        y += residual
    return y, Kept(x, low, None, product)


def _dropped(x: Tensor, keep: Tensor | None, dropout: Dropout | None) -> Tensor:
    return x if keep is None or dropout is None else dropout.apply(x, keep)


def linear_backward(
    slope: Tensor,
    layer: LoraLinear,
    term: Term | None,
    kept: Kept | None,
    dropout: Dropout | None = None,
    into: Tensor | None = None,
    by_input: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """The derivative by x, added to `into` in place (None unless `by_input`), and those by the term's
    leaves."""
    if term is None or kept is None:
        return (_by_base(slope, layer, into) if by_input else None), []
    tail = []
    if term.ratio is not None and term.norm is not None and kept.product is not None:
        tail = [(slope * kept.product).sum(0, dtype=term.norm.dtype) / term.norm]
        slope = (slope * term.ratio).to(slope.dtype)
    by_low = torch.mm(slope, term.b)
    x = _dropped(kept.x, kept.keep, dropout)
    leaves = [
        scaled_product(by_low.t(), x, term.scale),
        scaled_product(slope.t(), kept.low, term.scale),
        *tail,
    ]
    if not by_input:
        return None, leaves
    by_x = _by_base(slope, layer, into)
    if kept.keep is None or dropout is None:
        return by_x.addmm_(by_low, term.a, alpha=term.scale), leaves
    by_dropped = torch.mm(by_low, term.a).mul_(kept.keep)
    return by_x.add_(by_dropped, alpha=term.scale * dropout.gain), leaves


def _by_base(slope: Tensor, layer: LoraLinear, into: Tensor | None) -> Tensor:
    weight = layer.weight
    return torch.mm(slope, weight) if into is None else into.addmm_(slope, weight)


def scaled_product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale * first @ second, the scaling inside of the product."""
    out = first.new_empty(first.shape[0], second.shape[1])
    return torch.addmm(out, first, second, beta=0, alpha=scale, out=out)


def rms_norm(x: Tensor, gain: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """gain * x / sqrt(mean(x^2) + eps) over the last dimension, inside in float32 at least; what is kept.

    `eps` is a scalar tensor: a Python number would be made one at each call.
    """
    wide = x if x.dtype == eps.dtype else x.to(eps.dtype)
    total = (wide * wide).sum(-1, keepdim=True)
    scale = torch.add(eps, total, alpha=1.0 / x.shape[-1]).rsqrt_()
    normed = wide * scale
    return gain * (normed if wide is x else normed.to(x.dtype)), (normed, scale)


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
