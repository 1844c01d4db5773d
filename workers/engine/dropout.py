"""Dropout of an adapter's input as a function of (seed, operation, example, token, layer, feature).

A token's mask is the same wherever packing puts it, so that a micro-batch, a replay or a recomputed layer
drops the same numbers. Philox as in `random`, on torch tensors so that it runs where the model does; each
block of 128 bits decides eight features at 16 bits each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_FEATURES_PER_BLOCK = 8
# Told apart from the numbers that sampling draws by the same seed.
_DOMAIN = 0x64726F70


@dataclass(frozen=True)
class Dropout:
    """What drops in one pass: `p` of the features, keyed by `seed` and `stream` (the operation's seq).

    `rows` [T] and `places` [T] are each token's example within the operation and its position in it.
    """

    p: float
    seed: int
    stream: int
    rows: Tensor
    places: Tensor

    @property
    def threshold(self) -> int:
        """A feature is dropped where its 16 bits are below this."""
        return round(self.p * 65536)

    @property
    def gain(self) -> float:
        """What is kept is multiplied by this, so that the mean stays."""
        return 65536 / (65536 - self.threshold)

    def keep(self, layer: int, width: int) -> Tensor:
        """The mask [T, width] of layer number `layer`, true where a feature is kept."""
        blocks = -(-width // _FEATURES_PER_BLOCK)
        numbers = torch.arange(blocks, device=self.rows.device) + (layer << 16)
        shape = (len(self.rows), blocks)
        counter = (
            numbers.expand(shape),
            self.places[:, None].expand(shape),
            self.rows[:, None].expand(shape),
            torch.full((1, 1), self.stream & _LOW, device=self.rows.device).expand(shape),
        )
        key = self.seed & _LOW, ((self.seed >> 32) ^ (self.stream >> 32) ^ _DOMAIN) & _LOW
        halves = torch.stack(
            [half for word in philox(counter, key) for half in (word & 0xFFFF, word >> 16)], dim=-1
        )
        return (halves >= self.threshold).view(len(self.rows), -1)[:, :width]

    def apply(self, x: Tensor, keep: Tensor) -> Tensor:
        """`x` [T, width] with what is not kept at 0."""
        return (x * keep).mul_(self.gain)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32-10 block of each element; words of 32 bits in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product may pass 2^63: it wraps, and both of its halves are still right.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
