"""Cursors of lists."""

from __future__ import annotations

import pytest

from schemas.errors import SignalError
from web import cursors
from workers.settings import Settings


def test_a_cursor_gives_its_position_back(settings: Settings) -> None:
    assert cursors.decode(settings, "a", cursors.encode(settings, "a", 17)) == 17
    assert cursors.decode(settings, "a", None) is None


@pytest.mark.parametrize(
    "text", ["", "17", "x", "17-", "-1-0123456789abcdef", "٣-0123456789abcdef"]
)
def test_what_is_no_cursor_is_refused(settings: Settings, text: str) -> None:
    with pytest.raises(SignalError) as caught:
        cursors.decode(settings, "a", text)
    assert (caught.value.code, caught.value.param) == ("bad_cursor", "cursor")


def test_a_cursor_of_another_list_is_refused(settings: Settings) -> None:
    text = cursors.encode(settings, "runs|ann", 17)
    for scope, changed in (("runs|bob", text), ("runs|ann", text.replace("17", "18"))):
        with pytest.raises(SignalError):
            cursors.decode(settings, scope, changed)
