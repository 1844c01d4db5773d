"""Rows as bytes, and back."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text.ids import token_array
from workers.text.rows import Row, pack_rows, unpack_rows


def lists(row: Row) -> tuple[list[int], list[int], list[float]]:
    return list(row.tokens), list(row.targets), list(row.weights)


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


@given(batch=st.lists(ids, max_size=5))
def test_rows_survive_packing(batch: list[list[int]]) -> None:
    rows = [
        Row(
            token_array(tokens, 2**31, "tokens"),
            array("i", reversed(tokens)),
            array("f", [0.5]) * len(tokens),
        )
        for tokens in batch
    ]
    packed = pack_rows(rows)
    assert packed["lengths"] == [len(tokens) for tokens in batch]
    assert len(packed["tokens"]) == 4 * sum(packed["lengths"])
    assert [lists(row) for row in unpack_rows(packed)] == [lists(row) for row in rows]


def test_unpacked_rows_are_views() -> None:
    packed = pack_rows([Row(array("i", [1, 2]), array("i", [3, 4]), array("f", [1, 0]))])
    row = unpack_rows(packed)[0]
    assert isinstance(row.tokens, memoryview)
    assert row.tokens.obj is packed["tokens"]
    assert row.tokens.readonly


def test_packed_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="do not match"):
        unpack_rows({"lengths": [2], "tokens": bytes(4), "targets": bytes(8), "weights": bytes(8)})


def test_plain_rows_carry_nothing_else() -> None:
    rows = [Row(array("i", [1]), array("i", [2]), array("f", [1]), example=0)]
    assert set(pack_rows(rows)) == {"lengths", "tokens", "targets", "weights"}
    assert unpack_rows(pack_rows(rows))[0].example == 0


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def full_rows(draw: st.DrawFn) -> Row:
    length, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))

    def numbers(count: int) -> array[float]:
        return array("f", draw(st.lists(floats, min_size=count, max_size=count)))

    names = draw(st.sets(st.sampled_from(["logprobs", "advantages", "values"])))
    return Row(
        array("i", range(length)),
        array("i", range(length * width)),
        numbers(length * width),
        {name: numbers(length) for name in names},
        {name: draw(floats) for name in draw(st.sets(st.sampled_from(["reward", "chosen"])))},
        draw(st.integers(0, 9)),
        draw(st.booleans()),
    )


@given(rows=st.lists(full_rows(), max_size=5))
def test_everything_a_row_has_survives_packing(rows: list[Row]) -> None:
    for found, expected in zip(unpack_rows(pack_rows(rows)), rows, strict=True):
        assert lists(found) == lists(expected)
        assert found.width == expected.width
        assert {name: list(a) for name, a in found.arrays.items()} == {
            name: list(a) for name, a in expected.arrays.items()
        }
        assert (found.values, found.example, found.trained) == (
            expected.values,
            expected.example,
            expected.trained,
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": [2]},
        {"arrays": {"logprobs": [[0], bytes(8)]}},
        {"values": {"reward": [[0], [1.0, 2.0]]}},
        {"examples": []},
    ],
)
def test_packed_extras_that_do_not_match(wrong: dict[str, Any]) -> None:
    packed = {"lengths": [1], "tokens": bytes(4), "targets": bytes(4), "weights": bytes(4)}
    with pytest.raises((ValueError, IndexError)):
        unpack_rows({**packed, **wrong})
