"""The form of API keys."""

from __future__ import annotations

import re

import pytest

from web.accounts import keys


def test_a_key_has_the_documented_form_and_names_itself() -> None:
    key = keys.new_key()
    assert re.fullmatch(r"sk-signal-[0-9A-Za-z]{12}-[0-9A-Za-z]{38}", key.text)
    assert keys.public_id(key.text) == key.public_id
    assert keys.digest(key.text) == key.digest
    assert key.text not in repr(key.digest)


def test_keys_differ() -> None:
    assert len({keys.new_key().text for _ in range(50)}) == 50


def test_any_single_typo_is_refused_by_the_checksum() -> None:
    text = keys.new_key().text
    for place in range(len(keys.PREFIX), len(text)):
        other = "a" if text[place] != "a" else "b"
        assert keys.public_id(text[:place] + other + text[place + 1 :]) is None


@pytest.mark.parametrize(
    "text", ["", "sk-signal-", "sk-signal-x-y", "sk-other-abc", "sk-signal-" + "a" * 51, "é" * 61]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    assert keys.public_id(text) is None
