"""Reading JSONL: what is taken, what is refused and in which words, from which kinds of file."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError

from rewardsignal import data
from rewardsignal.data import DataError, Dataset
from schemas import content, placed
from schemas.examples import TrainingExample

Reader = Callable[..., Dataset[dict[str, Any]]]
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
CHAT = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def lines(*rows: Any) -> io.StringIO:
    return io.StringIO("".join(json.dumps(row) + "\n" for row in rows))


def test_limits_are_the_servers() -> None:
    assert data.MAX_EXAMPLES == placed.MAX_BATCH
    assert data.MAX_TEXT == content.MAX_TEXT
    assert data.MAX_MESSAGES == content.MAX_MESSAGES
    assert data.ROLES == content.ROLES


def test_chat() -> None:
    assert list(data.read_chat(lines(CHAT, [USER, ANSWER]))) == [CHAT, CHAT]


def test_a_path_is_read_again_each_time(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    text = f"\ufeff{json.dumps(CHAT)}\r\n\n  \n{json.dumps(CHAT)}".encode()
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    for path in (plain, str(packed)):
        rows = data.read_chat(path)
        assert list(rows) == list(rows) == [CHAT, CHAT]


def test_an_open_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT))
    with path.open("rb") as file:
        rows = data.read_chat(file)
        assert list(rows) == [CHAT]
        with pytest.raises(DataError, match=r"a\.jsonl: The open file was read before"):
            list(rows)


def test_rows_are_read_as_they_are_asked_for() -> None:
    rows = iter(data.read_chat(lines(CHAT, CHAT, "wrong")))
    assert [next(rows), next(rows)] == [CHAT, CHAT]
    with pytest.raises(DataError, match="line 3"):
        next(rows)


def test_further_fields() -> None:
    tagged = {**CHAT, "id": 7}
    with pytest.raises(DataError, match="extra='drop'") as caught:
        list(data.read_chat(lines(tagged)))
    assert (caught.value.line, caught.value.field) == (1, "id")
    assert list(data.read_chat(lines(tagged), extra="drop")) == [CHAT]
    assert list(data.read_chat(lines(tagged), extra="keep")) == [tagged]
    named = {"messages": [{**USER, "name": "x"}, ANSWER]}
    with pytest.raises(DataError) as caught:
        list(data.read_chat(lines(named)))
    assert caught.value.field == "messages.0.name"
    assert list(data.read_chat(lines(named), extra="drop")) == [CHAT]
    with pytest.raises(ValueError, match="extra is 'ignore'"):
        data.read_chat(lines(), extra="ignore")  # type: ignore[arg-type]


CHAT_FAULTS: list[tuple[Any, str | None]] = [
    (3, None),
    ("text", None),
    ({}, "messages"),
    ({"text": "a"}, "messages"),
    ([], "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": [USER] * 51}, "messages"),
    ({"messages": [USER]}, "messages"),
    ({"messages": ["a"]}, "messages.0"),
    ({"messages": [USER, {"content": "a"}]}, "messages.1.role"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages.1.content"),
    ({"messages": [USER, {"role": "pirate", "content": "a"}]}, "messages.1.role"),
    ({"messages": [USER, {"role": [], "content": "a"}]}, "messages.1.role"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages.1.content"),
    ({"messages": [{**USER, "content": "a" * 32_769}, ANSWER]}, "messages.0.content"),
    ({"messages": [{**USER, "content": "\ud83d"}, ANSWER]}, "messages.0.content"),
]
PAIR_FAULTS: list[tuple[Any, str | None]] = [
    ([PAIR], None),
    ({"prompt": "a", "chosen": "b"}, "rejected"),
    ({"chosen": "b", "rejected": "c"}, "prompt"),
    ({**PAIR, "prompt": ""}, "prompt"),
    ({**PAIR, "prompt": []}, "prompt"),
    ({**PAIR, "prompt": 3}, "prompt"),
    ({**PAIR, "chosen": [1, "a"]}, "chosen.1"),
    ({**PAIR, "chosen": [True]}, "chosen.0"),
    ({**PAIR, "chosen": [-1]}, "chosen.0"),
    ({**PAIR, "chosen": [ANSWER]}, "chosen"),
    ({**PAIR, "prompt": [USER], "chosen": [USER]}, "chosen.0.role"),
    ({**PAIR, "margin": float("nan")}, "margin"),
    ({**PAIR, "margin": True}, "margin"),
    ({**PAIR, "label": True}, "label"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "rejected"),
    ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "z"}, OTHER]}, "rejected"),
    ({"prompt": "z", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "prompt"),
]
ANSWER_FAULTS: list[tuple[Any, str | None]] = [
    ({"prompt": "a"}, "answer"),
    ({"answer": "a"}, "prompt"),
    ({"prompt": "a", "answer": None}, "answer"),
    ({"prompt": "a", "answer": True}, "answer"),
]
FAULTS = [
    *((data.read_chat, *fault) for fault in CHAT_FAULTS),
    *((data.read_preferences, *fault) for fault in PAIR_FAULTS),
    *((data.read_answers, *fault) for fault in ANSWER_FAULTS),
]


@pytest.mark.parametrize(("reader", "value", "field"), FAULTS)
def test_a_wrong_row_is_named(
    tmp_path: Path, reader: Reader, value: Any, field: str | None
) -> None:
    path = tmp_path / "my data.jsonl"
    path.write_text(f"\n\n{json.dumps(value)}\n")
    with pytest.raises(DataError) as caught:
        list(reader(path))
    assert (caught.value.source, caught.value.line) == (str(path), 3)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}, line 3{f', {field}' if field else ''}: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json}\n", "line 1: Not JSON"),
        (b'{"prompt": "\xff", "answer": 1}\n', "line 1: Not UTF-8"),
        (b"[" * 100_000, "line 1: Not JSON"),
        (gzip.compress(b'{"prompt": "a", "answer": 1}\n' * 9)[:-9], "line 10: Cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(data.read_answers(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: Cannot be read: No such file"):
        list(data.read_chat(tmp_path / "gone.jsonl"))


def test_an_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(DataError("Why.", "a.jsonl", 3, "messages")))
    assert str(error) == "a.jsonl, line 3, messages: Why."
    assert (error.source, error.line, error.field) == ("a.jsonl", 3, "messages")


def test_preferences() -> None:
    full = {**PAIR, "margin": 0.5, "ref_chosen_logps": -3.0, "ref_rejected_logps": -2}
    ids = {"prompt": [1], "chosen": [2], "rejected": [3]}
    turns = {"prompt": [USER], "chosen": [ANSWER], "rejected": "c"}
    assert list(data.read_preferences(lines(PAIR, full, ids, turns))) == [PAIR, full, ids, turns]


def test_whole_conversations_are_parted() -> None:
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    parted = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
    assert list(data.read_preferences(lines(whole, {"prompt": "a", **whole}))) == [parted, parted]


def test_answers_keep_what_a_reward_may_need() -> None:
    row = {"prompt": [USER], "answer": 4, "level": "easy"}
    assert list(data.read_answers(lines(row))) == [row]


def test_any_objects() -> None:
    assert list(data.read_jsonl(lines({"text": "a"}))) == [{"text": "a"}]
    with pytest.raises(DataError, match="A JSON object is needed"):
        list(data.read_jsonl(lines([])))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*data.ROLES, "x"]), "content": st.text(max_size=3)}
    ),
    max_size=3,
)
values = json_values | messages | st.lists(st.integers(0, 9), max_size=3)


@given(st.fixed_dictionaries({"prompt": values, "chosen": values, "rejected": values}))
def test_what_is_read_is_what_the_server_takes(row: dict[str, Any]) -> None:
    """Whatever a reader lets through, the server's schema takes; the reader may be stricter."""
    readers: list[tuple[Reader, Any]] = [
        (data.read_preferences, row),
        (data.read_chat, {"messages": row["prompt"]}),
    ]
    for reader, value in readers:
        try:
            (read,) = reader(lines(value))
        except DataError:
            continue
        try:
            TrainingExample().load(read)
        except ValidationError as error:
            raise AssertionError(f"{read}: {error.messages}") from None
