"""Counter-based random numbers: the same (key, row, token) gives the same number, in any order or batch.

Philox 4x32 with 10 rounds (Salmon et al., SC 2011, doi 10.1145/2063384.2063405), vectorised over rows. No
state: nothing to save with a run and nothing to lose when a worker dies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# (seed, stream): a request's own seed with stream 0, or the run's seed with the operation's seq.
SampleKey = tuple[int, int]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_U64 = (1 << 64) - 1


def uniform(key: SampleKey, rows: NDArray[np.int64], token: int) -> NDArray[np.float64]:
    """One number in (0, 1) for each of `rows` at position `token`, with 53 random bits.

    `key` is taken modulo 2^64 in both parts, so that negative seeds are seeds too.
    """
    return uniforms([key] * len(rows), rows, np.full(len(rows), token, np.int64))


def uniforms(
    keys: Sequence[SampleKey], rows: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The same with a key and a position of each row."""
    seeds = np.array([key[0] & _U64 for key in keys], np.uint64)
    streams = np.array([key[1] & _U64 for key in keys], np.uint64)
    wide = rows.astype(np.uint64)
    counter = np.stack((tokens.astype(np.uint64), wide & _LOW, streams & _LOW, streams >> _SHIFT))
    words = philox(counter, (seeds & _LOW, seeds >> _SHIFT))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * 2.0**26 + low + 0.5) / 2.0**53
    return numbers


def philox(
    counter: NDArray[np.uint64],
    key: tuple[int, int] | tuple[NDArray[np.uint64], NDArray[np.uint64]],
) -> NDArray[np.uint64]:
    """The Philox4x32-10 block of each column of `counter` [4, N] (words of 32 bits); `key` is two words, or
    two for each column."""
    c0, c1, c2, c3 = counter
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ k0,
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3))
