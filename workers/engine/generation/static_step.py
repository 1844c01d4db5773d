"""One token for every row as a function of tensors alone, all of fixed shape: what a CUDA graph can replay.

Rows and length are rounded up to powers of two, so that few shapes cover all batches. What differs from one
token to the next is copied into one small buffer; everything else is read where it lies: the base's weights,
the slab, and the adapters' `Stack`, whose numbers may be changed in place between two replays.

R rows of the shape, L positions of the shape, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.engine.determinism import unsorted_writes
from workers.engine.llama import Llama
from workers.engine.slab import Slab, Step
from workers.engine.spans import Span
from workers.engine.stack import Stack

# A shorter cache saves nothing against the weights that every token reads.
_LEAST_LENGTH = 128


class Shape(NamedTuple):
    """Rows, and positions of each, the one of the new token among them."""

    rows: int
    length: int

    @classmethod
    def over(cls, rows: int, length: int) -> Shape:
        """The smallest shape that holds so many rows of so many positions."""
        return cls(_power(rows), max(_LEAST_LENGTH, _power(length)))

    def fits(self, slab: Slab) -> bool:
        """Whether a slab has so many slots of so many positions."""
        return self.rows <= slab.slots and self.length <= slab.capacity


def _power(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


class StaticStep:
    """The step of one shape on one slab, with the adapters of one stack or, None, of the bare base.

    Valid as long as the slab does not move (`Slab.moves`).
    """

    def __init__(self, decoder: Llama, slab: Slab, shape: Shape, stack: Stack | None) -> None:
        """The slab has room for the shape, even where there are fewer rows: what lies beyond them writes to
        the first position of slots that hold no row, and a row that comes there overwrites it."""
        self.shape = shape
        self._decoder, self._stack, self._layers = decoder, stack, slab.layers
        like = decoder.embedding
        # The token, the position and the adapter of each row: one copy to the device in all.
        self._inputs = torch.zeros(3, shape.rows, dtype=torch.long, device=like.device)
        # Not in the memory of a graph, which other graphs overwrite.
        self.hidden = like.new_empty(shape.rows, like.shape[1])
        # Held here: the model drops its tables when it makes longer ones.
        self._tables = [part[0] for part in decoder.rope.first(shape.length)]
        self._places = torch.arange(shape.length, device=like.device)

    def fill(self, tokens: Sequence[int], lengths: Sequence[int], owners: Sequence[int]) -> None:
        """Of each row its last token, how many positions it has before that, and the number of its adapter
        in the stack, -1: none."""
        spare = [0] * (self.shape.rows - len(tokens))
        rows = [[*tokens, *spare], [*lengths, *spare], [*owners, *(-1 for _ in spare)]]
        self._inputs.copy_(torch.tensor(rows))

    def run(self) -> None:
        """Append the tokens' keys and values to the slab; their hidden states go to `hidden` [R, H].

        Looks at no number of any tensor, so it computes the same when it is replayed.
        """
        tokens, lengths, owners = self._inputs.unbind()
        terms = None if self._stack is None else self._stack.terms(owners)
        cos, sin = (table.index_select(0, lengths) for table in self._tables)
        mask = self._mask(lengths)
        # Several layers have one shape.
        steps = {
            shape: self._step(shape, lengths, mask)
            for shape in {store.keys.shape for store in self._layers}
        }
        with unsorted_writes():
            spans = [Span(0, self.shape.rows, terms)]
            x = self._decoder.advance(tokens, (cos, sin), steps, self._layers, spans)
        self.hidden.copy_(x)

    def _mask(self, lengths: Tensor) -> Tensor:
        """[R, 1, 1, L]: nobody sees what lies behind its own position."""
        hidden = self._places > lengths.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self.hidden.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _step(self, shape: torch.Size, lengths: Tensor, mask: Tensor) -> Step:
        """Where the keys and values of a layer of this shape go."""
        _, heads, capacity, _ = shape
        rows = self.shape.rows
        starts = torch.arange(rows * heads, device=lengths.device) * capacity
        own = lengths.unsqueeze(1).expand(rows, heads).reshape(-1)
        return Step(starts + own, self.shape.length, mask)
