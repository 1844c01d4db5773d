"""Rows that step together, with their keys and values.

A `SlabLane` is of our own decoder: rows of any adapters join and leave between tokens. A `BatchLane` is of
transformers' decoders, whose caches take no new rows: rows of one request begin together and leave as they
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.engine.base import Base
from workers.engine.decoder import Cache
from workers.engine.generation.prefill import ordered, prefill
from workers.engine.generation.replays import Capture, Replays
from workers.engine.generation.ticket import Row
from workers.engine.linear import Term
from workers.engine.llama import Llama
from workers.engine.lora import FrozenAdapter
from workers.engine.spans import Span, Spans, spans_of
from workers.engine.stack import Stack

# Rows that have ended are taken out of a batch when at most this part of it is left.
_COMPACT_BELOW = 0.75
# This part of the room stays allocated for captured steps.
_KEPT_PART = 8


class Lane(Protocol):
    """`rows` are those that go on; each lacks the keys and values of its last token alone."""

    rows: list[Row]

    def admit(self, new: Sequence[Row]) -> Tensor:
        """Take rows in, behind those that are there, in an order of its own; the hidden state of the last
        token of each [N, H]. An error leaves the lane as it was."""
        ...

    def decode(self) -> Tensor:
        """The hidden state of the last token of each row [R, H]. After an error it can be repeated."""
        ...

    def logits(self, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        """[N, V] of hidden states of these rows."""
        ...

    def keep(self, rows: Sequence[Row]) -> None:
        """Let go of all rows but these."""
        ...


class SlabLane:
    """Rows in the slots of a slab."""

    def __init__(
        self, base: Base, decoder: Llama, room: int, capture: Capture | None = None
    ) -> None:
        """`room` is how many positions the slab may have in all, unless one row needs more. With `capture`
        steps are captured and replayed where they can be; a little memory is then kept behind the last row.
        """
        self._base, self._decoder, self.room = base, decoder, room
        self.rows: list[Row] = []
        self._slab = decoder.slab()
        self._stack, self._usable = Stack([]), False
        self._replays = None if capture is None else Replays(decoder, room, capture)
        if self._replays is not None:
            # Captured steps are of where the slab lies.
            self._slab.kept = room // _KEPT_PART

    @property
    def longest(self) -> int:
        """Positions that the longest row may come to need."""
        return max((row.need for row in self.rows), default=0)

    def _reserve(self, rows: Sequence[Row], length: int) -> None:
        count, longest = len(rows), max(row.need for row in rows)
        shape = None if self._replays is None else self._replays.shape(count, length)
        if shape is not None:
            count, length, longest = *shape, max(shape.length, longest)
        self._slab.reserve(count, length, longest=longest, room=self.room)

    def admit(self, new: Sequence[Row]) -> Tensor:
        """See Lane.admit."""
        rows = ordered(new)
        lengths = [len(row.tokens) for row in rows]
        self._reserve([*self.rows, *rows], max([*lengths, *self._slab.lengths]) + 1)
        hidden = prefill(self._decoder, self._slab, self.rows, rows)
        self.rows += rows
        self._slab.lengths += lengths
        return hidden

    def decode(self) -> Tensor:
        """See Lane.decode."""
        self._reserve(self.rows, max(self._slab.lengths) + 1)
        last = [row.sample.token_ids[-1] for row in self.rows]
        if self._replays is not None and self._frozen:
            hidden = self._replayed(self._replays, last)
            if hidden is not None:
                return hidden
        tokens = torch.tensor(last, device=self._base.device)
        return self._decoder.decode(tokens, self._slab, self._spans())

    def _replayed(self, replays: Replays, last: Sequence[int]) -> Tensor | None:
        """The same by a captured step; None where there is none."""
        adapters = self._adapters()
        if adapters and not self._stacked(adapters):
            return None
        stack = self._stack if adapters else None
        return replays.decode(last, self._slab, stack, self._owners())

    @property
    def _frozen(self) -> bool:
        """Whether nobody changes the weights of the rows."""
        return all(isinstance(row.weights, FrozenAdapter | None) for row in self.rows)

    def _adapters(self) -> list[Sequence[Term | None]]:
        """What the rows are sampled with, each once, without the bare base."""
        adapters = {id(row.terms): row.terms for row in self.rows}
        return [terms for terms in adapters.values() if terms is not None]

    def _owners(self) -> list[int]:
        """The number of each row's adapter in the stack, -1: of the bare base."""
        numbers = {id(terms): number for number, terms in enumerate(self._stack.adapters)}
        return [numbers.get(id(row.terms), -1) for row in self.rows]

    def _spans(self) -> Spans:
        """What computes the rows: several adapters as one stack, where they can be stacked."""
        several = self._adapters()
        if len(several) < 2 or not self._frozen or not self._stacked(several):
            return spans_of([1] * len(self.rows), [row.terms for row in self.rows])
        owners = torch.tensor(self._owners(), device=self._base.device)
        return [Span(0, len(owners), self._stack.terms(owners))]

    def _stacked(self, adapters: Sequence[Sequence[Term | None]]) -> bool:
        """Whether these adapters can be stacked; the stack is made anew when others come that cannot take the
        places of those who left."""
        there = {id(terms) for terms in self._stack.adapters}
        wanted = {id(terms) for terms in adapters}
        spoilt = not self._usable and wanted != there
        if wanted <= there and not spoilt and len(there) <= 2 * len(wanted):
            return self._usable
        if spoilt or len(there) > 2 * len(wanted) or not self._stack.take(adapters):
            self._stack = Stack(adapters)
        self._usable = self._stack.usable
        return self._usable

    def logits(self, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        """See Lane.logits."""
        spans = spans_of([1] * len(rows), [row.terms for row in rows])
        return self._decoder.head.logits(hidden, spans)

    def keep(self, rows: Sequence[Row]) -> None:
        """See Lane.keep."""
        kept = {id(row) for row in rows}
        slots = {id(row): slot for slot, row in enumerate(self.rows)}
        going_on = [(slot, row) for slot, row in enumerate(self.rows) if id(row) in kept]
        for slot, row in enumerate(self.rows):
            # A mask multiplies what it hides by 0, which does not hide what is not finite: an error may have
            # left that, and so may a step that broke off and whose rows go on elsewhere.
            if id(row) not in kept and (row.ticket.error is not None or row.alive):
                self._slab.clear(slot)
        placed = _placed(going_on)
        if [id(row) for row in placed] != [id(row) for row in self.rows]:
            self._slab.arrange([slots[id(row)] for row in placed])
            self.rows = placed
        if not placed and self._replays is None:
            self._stack, self._usable = Stack([]), False


def _placed(rows: Sequence[tuple[int, Row]]) -> list[Row]:
    """The rows, with the slots where they are, so that those of one adapter lie side by side; each stays
    where it is if that slot is its adapter's."""
    placed: list[Row | None] = [None] * len(rows)
    begin = 0
    for group in _groups(rows):
        end, moved = begin + len(group), []
        for slot, row in group:
            if begin <= slot < end:
                placed[slot] = row
            else:
                moved.append(row)
        free = (at for at in range(begin, end) if placed[at] is None)
        for at, row in zip(list(free), moved, strict=True):
            placed[at] = row
        begin = end
    return [row for row in placed if row is not None]


def _groups(slots: Sequence[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    """The rows of each adapter, adapters in the order of their first slots."""
    groups: dict[int, list[tuple[int, Row]]] = {}
    for slot, row in slots:
        groups.setdefault(id(row.terms), []).append((slot, row))
    return list(groups.values())


class BatchLane:
    """Rows of one request in a cache of transformers'."""

    def __init__(self, base: Base) -> None:
        """Takes rows in once."""
        self._base = base
        self.rows: list[Row] = []
        self._cache: Cache | None = None
        # The row of each place of the cache, ended ones too.
        self._places: list[Row] = []

    def admit(self, new: Sequence[Row]) -> Tensor:
        """See Lane.admit."""
        rows = list(new)
        distinct = list(dict.fromkeys(tuple(row.tokens) for row in rows))
        room = max(row.need - len(row.tokens) for row in rows)
        with self._base.activated(rows[0].weights):
            hidden, cache = self._base.decoder.prefill(distinct, room)
        if len(rows) > len(distinct):
            numbers = {tokens: number for number, tokens in enumerate(distinct)}
            copies = torch.tensor(
                [numbers[tuple(row.tokens)] for row in rows], device=self._base.device
            )
            hidden, cache = hidden[copies], cache.select(copies)
        self.rows, self._places, self._cache = rows, list(rows), cache
        return hidden

    def decode(self) -> Tensor:
        """See Lane.decode."""
        last = [row.sample.token_ids[-1] for row in self._places]
        with self._base.activated(self.rows[0].weights):
            hidden = self._base.decoder.decode(
                torch.tensor(last, device=self._base.device), self._cache
            )
        if len(self.rows) == len(self._places):
            return hidden
        return hidden[self._numbers(self.rows)]

    def logits(self, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        """See Lane.logits."""
        with self._base.activated(rows[0].weights):
            return self._base.decoder.head.logits(hidden)

    def keep(self, rows: Sequence[Row]) -> None:
        """See Lane.keep."""
        kept = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) in kept]
        if not self.rows or self._cache is None:
            self._places, self._cache = [], None
        elif len(self.rows) <= _COMPACT_BELOW * len(self._places):
            self._cache = self._cache.select(self._numbers(self.rows))
            self._places = list(self.rows)

    def _numbers(self, rows: Sequence[Row]) -> Tensor:
        places = {id(row): place for place, row in enumerate(self._places)}
        return torch.tensor([places[id(row)] for row in rows], device=self._base.device)
