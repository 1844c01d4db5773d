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
# What adapters have in common that can take each other's place: by layer the rank and the scale.
_Kind = tuple[tuple[int, float] | None, ...]


class Stack:
    """Copies of A and B of `adapters`, layer by layer."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """The adapters are of one base and must not change any more."""
        self.adapters = list(adapters)
        self._kinds = [_kind(one) for one in adapters]
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

    def take(self, adapters: Sequence[Adapter]) -> bool:
        """Hold these too: who is not there gets, in place, what an adapter of the same ranks and scales had
        that is not among them. False, with nothing changed, where there is none for it."""
        wanted, there = ({id(one) for one in part} for part in (adapters, self.adapters))
        free = [number for number, one in enumerate(self.adapters) if id(one) not in wanted]
        places: dict[int, Adapter] = {}
        for one in adapters:
            if id(one) in there:
                continue
            kind = _kind(one)
            place = next((number for number in free if self._kinds[number] == kind), None)
            if place is None:
                return False
            free.remove(place)
            places[place] = one
        for place, one in places.items():
            self._put(place, one)
        return True

    def _put(self, place: int, adapter: Adapter) -> None:
        self.adapters[place] = adapter
        for layer, term in zip(self._layers, adapter, strict=True):
            if layer is not None and term is not None:
                layer.put(place, term)

    def terms(self, owners: Tensor) -> list[Stacked | None]:
        """By layer, what is added for rows of the adapters of these numbers [R], -1: of none."""
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
        wide = torch.promote_types(a.dtype, torch.float32)
        self._numbers = torch.tensor([number for number, _ in columns], device=a.device)
        self._scales = torch.tensor([scale for _, scale in columns], dtype=wide, device=a.device)

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

    def put(self, number: int, term: Term) -> None:
        """Overwrite the columns of one adapter."""
        begin = next(at for at, (owner, _) in enumerate(self.columns) if owner == number)
        columns = slice(begin, begin + len(term.a))
        self.a[columns] = term.a.detach()
        self.b[:, columns] = term.b.detach()

    def gains(self, owners: Tensor) -> Tensor:
        """[R, C]: the scale where a column is of the row's adapter, else 0."""
        return (owners.unsqueeze(1) == self._numbers) * self._scales


def _kind(adapter: Adapter) -> _Kind:
    return tuple(None if term is None else (len(term.a), term.scale) for term in adapter)
