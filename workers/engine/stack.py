"""The adapters of one batch side by side: one product with all their A, one with all their B, whatever their
number.

Each row's products with other adapters are multiplied by 0 in between, which hides them only if they are
finite: adapters that are not, and those of DoRA, cannot be stacked. S adapters, R rows, C the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.linear import Term
from workers.engine.spans import Stacked

Adapter = Sequence[Term | None]


class Stack:
    """Copies of A and B of `adapters`, layer by layer."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """The adapters are of one base and must not change any more."""
        self.adapters = list(adapters)
        self._layers = [_Layer.of(terms) for terms in zip(*adapters, strict=True)]

    @property
    def usable(self) -> bool:
        """Whether it computes what each adapter computes alone."""
        if any(
            term is not None and term.ratio is not None for one in self.adapters for term in one
        ):
            return False
        parts = [part for layer in self._layers if layer is not None for part in (layer.a, layer.b)]
        return bool(torch.stack([part.isfinite().all() for part in parts]).all())

    def terms(self, owners: Sequence[int]) -> list[Stacked | None]:
        """By layer, what is added for rows of the adapters of these numbers, -1: of none."""
        gains: dict[object, Tensor] = {}
        found: list[Stacked | None] = []
        for layer in self._layers:
            if layer is None:
                found.append(None)
                continue
            if layer.columns not in gains:
                gains[layer.columns] = layer.gains(owners)
            found.append(Stacked(layer.a, layer.b, gains[layer.columns]))
        return found


class _Layer:
    """`a` [C, in], `b` [out, C], and of each column its adapter and its scale."""

    def __init__(self, a: Tensor, b: Tensor, columns: tuple[tuple[int, float], ...]) -> None:
        self.a, self.b, self.columns = a, b, columns

    @classmethod
    def of(cls, terms: Sequence[Term | None]) -> _Layer | None:
        """The terms of one layer; None where no adapter has one."""
        there = [(number, term) for number, term in enumerate(terms) if term is not None]
        if not there:
            return None
        a = torch.cat([term.a.detach() for _, term in there])
        b = torch.cat([term.b.detach() for _, term in there], 1)
        columns = [(number, term.scale) for number, term in there for _ in range(len(term.a))]
        return cls(a, b, tuple(columns))

    def gains(self, owners: Sequence[int]) -> Tensor:
        """[R, C]: the scale where a column is of the row's adapter, else 0."""
        device = self.a.device
        numbers = torch.tensor([number for number, _ in self.columns], device=device)
        wide = torch.promote_types(self.a.dtype, torch.float32)
        scales = torch.tensor([scale for _, scale in self.columns], dtype=wide, device=device)
        own = torch.tensor(owners, device=device).unsqueeze(1) == numbers
        return own * scales
