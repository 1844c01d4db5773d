"""The counter-based generator against published vectors, and its use."""

from __future__ import annotations

import numpy as np

from workers.engine.random import philox, uniform, uniforms


def test_philox_gives_the_published_vectors() -> None:
    # kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        block = philox(np.array(counter, np.uint64)[:, None], key)
        assert tuple(int(word) for word in block[:, 0]) == expected


def test_numbers_depend_on_key_row_and_token_alone() -> None:
    rows = np.arange(100, dtype=np.int64)
    numbers = uniform((3, 5), rows, 2)
    assert np.array_equal(numbers[40:60], uniform((3, 5), rows[40:60], 2))
    for other in (uniform((3, 5), rows, 3), uniform((3, 6), rows, 2), uniform((4, 5), rows, 2)):
        assert not np.isin(other, numbers).any()


def test_numbers_are_uniform() -> None:
    numbers = uniform((0, 0), np.arange(20_000, dtype=np.int64), 0)
    assert numbers.min() > 0 and numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    # 19 degrees of freedom: 43.8 is exceeded once in a thousand keys.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8


def test_rows_of_several_keys_get_the_numbers_of_each() -> None:
    keys = [(3, 5), (-1, 2**40), (2**63, 0)]
    rows, tokens = np.array([4, 0, 2**33], np.int64), np.array([0, 7, 2**20], np.int64)
    for at, number in enumerate(uniforms(keys, rows, tokens)):
        assert number == uniform(keys[at], rows[at : at + 1], int(tokens[at]))[0]
