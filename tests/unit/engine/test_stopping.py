"""Where a row ends and what its text is, with a tokenizer of one character or byte per token."""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.stopping import Continuation, StopRule

END = 0x110000


class Bytes:
    """Tokens are UTF-8 bytes; END is a special token of the text <end>."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = b"" if skip_special_tokens else b"<end>"
        return b"".join(special if i == END else bytes([i]) for i in ids).decode(errors="replace")


def _feed(
    ids: Sequence[int], *, texts: tuple[str, ...] = (), tokens: Sequence[int] = (), limit: int = 99
) -> Continuation:
    row = Continuation(StopRule(frozenset(tokens), texts), Bytes(), limit)
    for token in ids:
        if not row.finished:
            row.add(token, -0.5)
    return row


def test_a_limit_ends_a_row() -> None:
    sample = _feed(b"abcdef", limit=3).sample
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("abc", [97, 98, 99], "length")
    assert sample.logprobs == [-0.5] * 3


def test_the_earliest_stop_text_cuts() -> None:
    sample = _feed(b"one\n\ntwo", texts=("two", "\n\n")).sample
    assert (sample.text, sample.finish_reason, len(sample.token_ids)) == ("one", "stop", 5)


def test_characters_of_several_tokens() -> None:
    sample = _feed("naïve → end".encode(), texts=("→",)).sample
    assert sample.text == "naïve " and len(sample.token_ids) == len("naïve →".encode())


def test_a_special_token_can_be_a_stop_text() -> None:
    sample = _feed([*b"done", END, *b"more"], texts=("<end>",)).sample
    assert (sample.text, len(sample.token_ids)) == ("done", 5)
    crossing = _feed([*b"done", END, *b"more"], texts=("e<end>m",)).sample
    assert (crossing.text, len(crossing.token_ids)) == ("don", 6)


def test_a_long_row_before_the_stop_text_is_kept_whole() -> None:
    text = "x" * 500 + "STOP"
    sample = _feed(text.encode(), texts=("STOP",), limit=1000).sample
    assert sample.text == "x" * 500 and sample.finish_reason == "stop"


def test_a_stop_token_comes_before_a_stop_text() -> None:
    sample = _feed([*b"ab", END], texts=("<end>",), tokens=[END]).sample
    assert (sample.text, sample.token_ids) == ("ab", [97, 98, END])
