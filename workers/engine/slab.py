"""Keys and values of the rows that are being continued: one tensor per layer, a row in each slot.

Rows lie in the first slots, each from its first position on and as long as it is, so that a step works on
views up to the longest row. Whatever lies behind a row's end is finite, since a mask multiplies it by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Capacity comes in steps of so many positions.
_STEP = 64


@dataclass
class KeyValues:
    """Keys and values of one layer [slots, kv heads, capacity, head size]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Step:
    """Where one more token of each row goes, the same in all layers of one shape: `index` [rows * kv heads]
    into the flat slots, `end` the positions to look at, and an additive `mask` [rows, 1, 1, end] where rows
    are of several lengths."""

    index: Tensor
    end: int
    mask: Tensor | None


class Slab:
    """`lengths` are those of the rows, slot by slot; `layers` hold them."""

    def __init__(self, shapes: Sequence[tuple[int, int]], like: Tensor) -> None:
        """`shapes` are (kv heads, head size) of each layer; numbers are of the kind of `like`."""
        self._shapes, self._like = list(shapes), like
        self.lengths: list[int] = []
        self.slots = self.capacity = 0
        self.layers = self._empty(0, 0)
        # How often the layers' memory was another one's than before.
        self.moves = 0
        # Positions in all that stay allocated when rows leave.
        self.kept = 0

    def _empty(self, slots: int, capacity: int) -> list[KeyValues]:
        sizes = [(slots, heads, capacity, size) for heads, size in self._shapes]
        return [KeyValues(self._like.new_zeros(s), self._like.new_zeros(s)) for s in sizes]

    def reserve(self, slots: int, length: int, *, longest: int, room: int) -> None:
        """Have room for `slots` rows of `length` positions. It grows by half where that stays within
        `longest` positions of a row and `room` in all, so that rows are seldom copied."""
        if slots <= self.slots and length <= self.capacity:
            return
        capacity = self.capacity
        if length > capacity:
            wanted = -(-max(length, capacity * 3 // 2) // _STEP) * _STEP
            capacity = max(length, min(wanted, longest))
        elif slots * capacity > room:
            # A longer row was here before.
            capacity = max(length, room // slots)
        roomy = max(slots, min(self.slots * 3 // 2, room // capacity))
        self._resize(roomy if slots > self.slots else min(self.slots, roomy), capacity)

    def _resize(self, slots: int, capacity: int) -> None:
        self.moves += 1
        # The sizes are set at the end: if memory ends on the way, the next attempt begins again.
        rows, used = len(self.lengths), max(self.lengths, default=0)
        for number, (heads, size) in enumerate(self._shapes):
            # Layer by layer: both of one layer are there at a time.
            for name in ("keys", "values"):
                new = self._like.new_zeros(slots, heads, capacity, size)
                old: Tensor = getattr(self.layers[number], name)
                new[:rows, :, :used] = old[:rows, :, :used]
                setattr(self.layers[number], name, new)
        self.slots, self.capacity = slots, capacity

    def arrange(self, order: Sequence[int]) -> None:
        """Keep the rows of these slots, in this order; only those that change their place are copied."""
        used = max((self.lengths[slot] for slot in order), default=0)
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            device = self._like.device
            to, origin = (torch.tensor(part, device=device) for part in zip(*moved, strict=True))
            for layer in self.layers:
                for store in (layer.keys, layer.values):
                    store[to, :, :used] = store[origin, :, :used]
        self.lengths = [self.lengths[slot] for slot in order]
        self._shrink(used)

    def _shrink(self, used: int) -> None:
        if self.slots * self.capacity <= self.kept:
            return
        if not self.lengths:
            self.moves += 1
            self.slots = self.capacity = 0
            self.layers = self._empty(0, 0)
        elif 4 * len(self.lengths) <= self.slots:
            self._resize(2 * len(self.lengths), self.capacity)

    def clear(self, slot: int) -> None:
        """Overwrite a row that holds numbers which are not finite."""
        for layer in self.layers:
            layer.keys[slot] = 0
            layer.values[slot] = 0

    def write(self, layer: int, slots: slice, begin: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [kv heads, length, size] at `begin` of each of the slots."""
        store, end = self.layers[layer], begin + keys.shape[1]
        store.keys[slots, :, begin:end] = keys
        store.values[slots, :, begin:end] = values

    def share(self, layer: int, source: int, slots: slice, length: int) -> None:
        """Copy the first `length` positions of slot `source` to the slots."""
        store = self.layers[layer]
        store.keys[slots, :, :length] = store.keys[source, :, :length]
        store.values[slots, :, :length] = store.values[source, :, :length]

    def steps(self) -> dict[torch.Size, Step]:
        """Where the next token of each row goes, by the shape of a layer; all have room for it."""
        return {shape: self._step(shape) for shape in {store.keys.shape for store in self.layers}}

    def _step(self, shape: torch.Size) -> Step:
        (_, heads, capacity, _), device = shape, self._like.device
        lengths = torch.tensor(self.lengths, device=device)
        starts = torch.arange(len(lengths) * heads, device=device) * capacity
        index, end = starts.view(-1, heads).add_(lengths[:, None]).view(-1), max(self.lengths) + 1
        if min(self.lengths) + 1 == end:
            return Step(index, end, None)
        mask = torch.zeros(len(lengths), end, dtype=self._like.dtype, device=device)
        mask.masked_fill_(torch.arange(end, device=device) > lengths.unsqueeze(1), -torch.inf)
        return Step(index, end, mask[:, None, None])

    def repeat(self, times: int) -> Slab:
        """Each row `times` times, copies side by side."""
        rows = torch.arange(len(self.lengths), device=self._like.device)
        return self.select(rows.repeat_interleave(times))

    def select(self, rows: Tensor) -> Slab:
        """Only these rows, in this order, in memory of their own."""
        made = Slab(self._shapes, self._like)
        made.layers = [KeyValues(one.keys[rows], one.values[rows]) for one in self.layers]
        made.lengths = [self.lengths[row] for row in rows.tolist()]
        made.slots, made.capacity = len(made.lengths), self.capacity
        return made
