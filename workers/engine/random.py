"""Counter-based random numbers: the same (key, row, token) gives the same number, in any order or batch.

Philox 4x32 with 10 rounds (Salmon et al., SC 2011, doi 10.1145/2063384.2063405), vectorised over rows. No
state: nothing to save with a run and nothing to lose when a worker dies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# (seed, stream): a request's own seed with stream 0, or the run's seed with the operation's seq.
SampleKey = tuple[int, int]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_U64 = (1 << 64) - 1


def uniform(key: SampleKey, rows: NDArray[np.int64], token: int) -> NDArray[np.float64]:
    """One number in (0, 1) for each of `rows` at position `token`, with 53 random bits.

    `key` is taken modulo 2^64 in both parts, so that negative seeds are seeds too.
    """
    seed, stream = key[0] & _U64, key[1] & _U64
    counter = np.empty((4, len(rows)), np.uint64)
    counter[0] = token
    counter[1] = rows.astype(np.uint64) & _LOW
    counter[2] = stream & 0xFFFFFFFF
    counter[3] = stream >> 32
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * 2.0**26 + low + 0.5) / 2.0**53
    return numbers


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """The Philox4x32-10 block of each column of `counter` [4, N] (words of 32 bits)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))
