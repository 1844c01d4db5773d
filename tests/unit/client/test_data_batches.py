"""Datasets, the order of an epoch, and batches: nothing lost, nothing twice, resumable anywhere."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewardsignal.data import (
    MAX_EXAMPLES,
    Batches,
    DataError,
    Dataset,
    read_answers,
    read_jsonl,
    shuffled,
)

SETTINGS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "epochs": st.integers(1, 3),
        "shuffle": st.booleans(),
        "seed": st.integers(-2, 2),
        "drop_last": st.booleans(),
    }
)
BUDGETS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(5, 20),
        "batch_size": st.none() | st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "shuffle": st.booleans(),
    }
)


def tokens(*lengths: int) -> list[dict[str, Any]]:
    return [{"tokens": [place] * length} for place, length in enumerate(lengths)]


def numbered(path: Path, count: int) -> Path:
    """A file of rows with their numbers, and blank lines between them."""
    path.write_text("\n".join(json.dumps({"n": n}) + "\n" for n in range(count)))
    return path


def test_the_order_is_the_same_everywhere() -> None:
    # What the docstring says, once more and by hand; a change would part every resumed epoch.
    assert list(shuffled(10, 7)) == [2, 5, 1, 8, 6, 7, 3, 9, 4, 0]
    assert list(shuffled(5, -1, 3)) == [0, 1, 4, 3, 2]


@given(st.integers(0, 300), st.integers(), st.integers(0, 9))
def test_an_order_has_every_number_once(count: int, seed: int, epoch: int) -> None:
    order = list(shuffled(count, seed, epoch))
    assert sorted(order) == list(range(count))
    assert order == list(shuffled(count, seed, epoch))


def test_orders_are_spread_evenly() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(shuffled(4, seed))
        seen[order] = seen.get(order, 0) + 1
    # 24 orders, 100 of each expected; the standard deviation is 10.
    assert len(seen) == 24
    assert max(abs(count - 100) for count in seen.values()) < 50


@given(st.integers(9, 40), SETTINGS)
def test_every_row_comes_once_an_epoch(count: int, settings: dict[str, Any]) -> None:
    rows = list(range(count))
    batches = list(Batches(rows, **settings))
    size, epochs = settings["batch_size"], settings["epochs"]
    kept = count - count % size if settings["drop_last"] else count
    given_rows = [row for batch in batches for row in batch]
    assert all(len(batch) <= size for batch in batches)
    assert len(given_rows) == kept * epochs
    for epoch in range(epochs):
        own = given_rows[epoch * kept : (epoch + 1) * kept]
        order = list(shuffled(count, settings["seed"], epoch)) if settings["shuffle"] else rows
        assert own == order[:kept]


@given(st.integers(9, 30), SETTINGS, st.integers(0, 20))
def test_resuming_is_not_resuming(count: int, settings: dict[str, Any], after: int) -> None:
    rows = list(range(count))
    whole = list(Batches(rows, **settings))
    begun = Batches(rows, **settings)
    assert list(islice(begun, after)) == whole[:after]
    state = json.loads(json.dumps(begun.state()))
    resumed = Batches(rows, **settings, state=state)
    assert len(resumed) == len(begun) == len(whole[after:])
    assert list(resumed) == whole[after:]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), BUDGETS, st.integers(0, 20))
def test_by_tokens(lengths: list[int], settings: dict[str, Any], after: int) -> None:
    rows = tokens(*lengths)
    size = settings["batch_size"] or MAX_EXAMPLES
    whole = list(Batches(rows, **settings))
    assert sum(map(len, whole)) == len(rows) * settings["epochs"]
    for batch, following in zip(whole, [*whole[1:], None], strict=True):
        used = sum(len(row["tokens"]) for row in batch)
        assert used <= settings["max_tokens"]
        assert 1 <= len(batch) <= size
        if following and settings["epochs"] == 1 and len(batch) < size:
            # As full as the order allows.
            assert used + len(following[0]["tokens"]) > settings["max_tokens"]
    begun = Batches(rows, **settings)
    list(islice(begun, after))
    assert list(Batches(rows, **settings, state=begun.state())) == whole[after:]


def test_a_call_takes_128_examples() -> None:
    assert [len(batch) for batch in Batches([{"tokens": [1]}] * 300, max_tokens=1000)] == [
        128,
        128,
        44,
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_row_over_the_budget_is_named(tmp_path: Path, shuffle: bool) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in tokens(2, 9, 2)))
    expected = "line 3: has 9 tokens" if shuffle else r"row 1 \(from 0\): has 9 tokens"
    batches = Batches(read_jsonl(path), max_tokens=5, shuffle=shuffle)
    with pytest.raises(DataError, match=expected):
        list(batches)
    # Asked again it says so again: nothing is passed over silently.
    with pytest.raises(DataError, match="max_tokens"):
        list(batches)


def test_length_counts_what_tokens_there_are() -> None:
    batches = Batches(["aa", "b", "ccc"], max_tokens=3, length=len)
    assert list(batches) == [["aa", "b"], ["ccc"]]
    with pytest.raises(TypeError, match="length="):
        next(Batches([{"text": "a"}], max_tokens=3))
    with pytest.raises(TypeError, match=r"not 1\.5"):
        next(Batches(["a"], max_tokens=3, length=lambda row: 1.5))  # type: ignore[arg-type,return-value]


def test_it_says_where_it_is() -> None:
    batches = Batches(range(5), batch_size=2, epochs=2)
    assert [(batches.epoch, batches.position, len(batches)) for _ in batches] == [
        (0, 2, 5),
        (0, 4, 4),
        (0, 5, 3),
        (1, 2, 2),
        (1, 4, 1),
        (1, 5, 0),
    ]


def test_without_end() -> None:
    batches = Batches([1, 2, 3], batch_size=2, epochs=None)
    assert list(islice(batches, 5)) == [[1, 2], [3], [1, 2], [3], [1, 2]]
    assert batches
    with pytest.raises(TypeError, match="known only"):
        len(batches)


@pytest.mark.parametrize("epochs", [1, None])
def test_no_batch_at_all_is_an_error_and_not_for_ever(epochs: int | None) -> None:
    with pytest.raises(DataError, match="no rows"):
        next(Batches([], batch_size=2, epochs=epochs))
    with pytest.raises(DataError, match="fewer than 4 rows"):
        next(Batches([1, 2, 3], batch_size=4, drop_last=True, epochs=epochs))


def test_a_bad_line_does_not_end_an_epoch_early(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\nwrong\n')
    batches = Batches(read_jsonl(path), batch_size=2)
    assert next(batches) == [{"n": 0}, {"n": 1}]
    for _ in range(2):
        with pytest.raises(DataError, match="line 3"):
            next(batches)


def test_shuffling_a_file_checks_it_first(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"n": 0}\nwrong\n')
    with pytest.raises(DataError, match="line 2"):
        Batches(read_jsonl(path), batch_size=1, shuffle=True)


def test_a_file_by_number(tmp_path: Path) -> None:
    rows = read_jsonl(numbered(tmp_path / "data.jsonl", 20))
    assert rows.random_access
    assert [rows[n]["n"] for n in (0, 7, 19, -1)] == [0, 7, 19, 19]
    assert len(rows) == 20
    with pytest.raises(IndexError, match="20 rows"):
        rows[20]
    found = [row["n"] for batch in Batches(rows, batch_size=3, shuffle=True) for row in batch]
    assert found == list(shuffled(20, 0))


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    rows = read_jsonl(numbered(tmp_path / "data.jsonl", 3))
    assert len(rows) == 3
    numbered(tmp_path / "data.jsonl", 4)
    with pytest.raises(DataError, match="changed"):
        rows[0]


def test_what_has_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(numbered(tmp_path / "data.jsonl", 4).read_bytes()))
    for rows in (read_jsonl(path), Dataset(lambda: iter([{"n": n} for n in range(4)]))):
        assert not rows.random_access
        with pytest.raises(TypeError, match="in_memory"):
            len(rows)
        with pytest.raises(TypeError, match="in_memory"):
            Batches(rows, batch_size=2, shuffle=True)
        shuffle = Batches(rows.in_memory(), batch_size=4, shuffle=True)
        assert [row["n"] for row in next(shuffle)] == list(shuffled(4, 0))
        begun = Batches(rows, batch_size=3)
        next(begun)
        assert list(Batches(rows, batch_size=3, state=begun.state())) == [[{"n": 3}]]


def test_what_can_be_read_once_is_no_dataset() -> None:
    for source in (iter([1]), 3):
        with pytest.raises(TypeError, match="cannot be read again"):
            Dataset(source)  # type: ignore[arg-type]


def test_mapped_rows(tmp_path: Path) -> None:
    rows = read_jsonl(numbered(tmp_path / "data.jsonl", 4))
    doubled = rows.map(lambda row: 2 * row["n"])
    assert list(doubled) == [0, 2, 4, 6]
    assert doubled[1] == 2
    assert doubled.where(1).endswith("data.jsonl, line 3")
    assert list(Dataset(lambda: [1, 2]).map(str)) == ["1", "2"]
    assert rows


def test_rows_are_held_one_at_a_time(tmp_path: Path) -> None:
    read = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            read.append(number)
            yield number
            number += 1

    batches = Batches(Dataset(endless), batch_size=3)
    assert [next(batches), next(batches)] == [[0, 1, 2], [3, 4, 5]]
    assert len(read) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "batch_size or max_tokens"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"batch_size": 1, "epochs": 0}, "epochs is 0"),
        ({"max_tokens": 9, "drop_last": True}, "drop_last"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Batches([1], **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 3}, "batch_size=3, here it is 2"),
        ({"seed": 1}, "seed=1"),
        ({"rows": 9}, "rows=9, here it is 4"),
        ({"version": 2}, "version=2"),
        ({"position": -1}, "position is -1"),
        ({"epoch": "1"}, "epoch is '1'"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], words: str) -> None:
    state = Batches(range(4), batch_size=2, shuffle=True).state()
    with pytest.raises(ValueError, match=words):
        Batches(range(4), batch_size=2, shuffle=True, state={**state, **change})


def test_a_dataset_that_became_shorter_is_refused() -> None:
    begun = Batches(range(4), batch_size=4)
    next(begun)
    with pytest.raises(DataError, match="has 3 rows; the state is after 4"):
        list(Batches(range(3), batch_size=4, state=begun.state()))


def test_answers_over_a_list_of_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps({"prompt": path.stem, "answer": 1}))
    both = Dataset(lambda: (row for path in paths for row in read_answers(path)))
    assert [row["prompt"] for row in both] == ["a", "b"]
