"""Rows of several adapters in one batch: one product with the base's weight for all of them, and each
adapter's own part on its rows alone.

What a row gets does not depend on whose rows lie beside it, up to the rounding of the shared product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.engine import kernels
from workers.engine.linear import LoraLinear, Term

_HALVES = (torch.bfloat16, torch.float16)
# Rows up to which the product with the weight on the left is the faster one, measured.
_MOST_TURNED = 128

# What an adapter adds to each layer of a base, by layer number; None: the bare base.
Terms = Sequence[Term | None] | None


class Stacked(NamedTuple):
    """What several adapters add to one layer: `a` [C, in], `b` [out, C], and `gains` [R, C] in float32 at
    least: the scale, or 0 where a column is not of a row's adapter."""

    a: Tensor
    b: Tensor
    gains: Tensor


class Span(NamedTuple):
    """Rows `begin` to `end` - 1 of a batch and what computes them."""

    begin: int
    end: int
    terms: Sequence[Term | Stacked | None] | None

    def term(self, layer: LoraLinear) -> Term | Stacked | None:
        """What is added in `layer`."""
        return None if self.terms is None else self.terms[layer.index]


Spans = Sequence[Span]


def spans_of(counts: Sequence[int], terms: Sequence[Terms]) -> list[Span]:
    """The spans of units of `counts` rows that lie in this order; neighbours of one adapter are joined."""
    spans: list[Span] = []
    end = 0
    for count, own in zip(counts, terms, strict=True):
        if spans and spans[-1].terms is own:
            spans[-1] = spans[-1]._replace(end=end + count)
        else:
            spans.append(Span(end, end + count, own))
        end += count
    return spans


def linear(x: Tensor, layer: LoraLinear, spans: Spans, residual: Tensor | None = None) -> Tensor:
    """`residual` + base(x) + each span's adapter, for `x` [N, I] -> [N, O]; no derivative is kept.

    In memory the result may lie column by column.
    """
    only = spans[0].term(layer)
    if len(spans) == 1 and not _few(x) and not isinstance(only, Stacked):
        return kernels.linear(x, layer, only, residual=residual)[0]
    y = product(x, layer.weight)
    for span in spans:
        term = span.term(layer)
        if term is not None:
            add_term(y, x, span, term)
    if layer.bias is not None:
        y += layer.bias
    return y if residual is None else residual + y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [N, O] the fastest way."""
    return torch.mm(weight, x.t()).t() if _few(x) else torch.mm(x, weight.t())


def add_term(y: Tensor, x: Tensor, span: Span, term: Term | Stacked) -> None:
    """Add what `term` makes of the span's rows of `x` to `y`, in place, and bring it to its length."""
    low, part = torch.mm(x[span.begin : span.end], term.a.t()), y[span.begin : span.end]
    if isinstance(term, Stacked):
        part.addmm_((low * term.gains).to(low.dtype), term.b.t())
        return
    part.addmm_(low, term.b.t(), alpha=term.scale)
    if term.ratio is not None:
        part.copy_(part * term.ratio)


def _few(x: Tensor) -> bool:
    """Whether W x^T is faster than x W^T: on a CPU in 16 bits it reads the weight once and as it lies."""
    return x.dtype in _HALVES and x.device.type == "cpu" and 2 <= len(x) <= _MOST_TURNED
