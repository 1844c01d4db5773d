"""Strict JSON out and in."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from schemas.errors import SignalError
from web.answers import encode, list_of, rfc3339, splice
from web.parsing import parse


def test_a_result_is_spliced_in_as_it_was_stored() -> None:
    raw = b'{"loss":1.10,"seq":3}'
    body = splice({"object": "future"}, "result", raw)
    assert raw in body
    assert json.loads(body) == {"object": "future", "result": {"loss": 1.1, "seq": 3}}
    assert json.loads(splice({"a": 1}, "result", None)) == {"a": 1, "result": None}


def test_lists_are_joined_without_parsing() -> None:
    body = json.loads(list_of([b'{"a":1}', b"{}"], has_more=False))
    assert body == {"object": "list", "has_more": False, "data": [{"a": 1}, {}]}
    assert json.loads(list_of([]))["data"] == []


def test_nan_is_never_answered() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode({"loss": float("nan")})


def test_times_are_rfc3339_with_z() -> None:
    assert rfc3339(0.1234) == "1970-01-01T00:00:00.123Z"
    moment = datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=timezone(timedelta(hours=2)))
    assert rfc3339(moment) == "2026-01-02T01:04:05.678Z"
    assert rfc3339(datetime(2026, 1, 2, tzinfo=UTC)) == "2026-01-02T00:00:00.000Z"
    assert rfc3339(None) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nul",
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        b'"\\ud800"',
        b'"\\uDC00x"',
        b"{} {}",
    ],
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(SignalError) as caught:
        parse(data)
    assert caught.value.code == "malformed_json"


def test_whole_surrogate_pairs_are_text() -> None:
    assert parse(b'"\\ud83d\\ude00"') == "\U0001f600"
