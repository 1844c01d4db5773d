"""Texts: deltas that add up to the text, stop texts across tokens, what is held back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.generation.support import alone, ask, finish, generator_of, tokenizer_of
from tests.unit.engine.support import make_trainer
from workers.engine.base import Base
from workers.engine.generation import SampleOutput
from workers.engine.generation.streaming import TextStream
from workers.engine.stopping import Sample


def _listened(base: Base, tiny: Path, **options: Any) -> tuple[SampleOutput, dict[int, list[Any]]]:
    heard: dict[int, list[Any]] = {}

    def listen(row: int, token: int, logprob: float, text: str | None) -> None:
        heard.setdefault(row, []).append((token, logprob, text))

    request = ask(
        tokenizer=tokenizer_of(tiny), on_token=listen, weights=make_trainer(base).adapter, **options
    )
    generator = generator_of(base)
    return finish(generator, generator.submit(request))[0], heard


def _texts(heard: Sequence[Any]) -> list[str]:
    return [text for _, _, text in heard if text is not None]


def test_deltas_add_up_to_the_text(base: Base, tiny: Path) -> None:
    output, heard = _listened(base, tiny, n=2, max_tokens=150)
    samples = [sample for row in output.samples for sample in row]
    assert len(heard) == len(samples) == 6
    for row, sample in enumerate(samples):
        assert [token for token, _, _ in heard[row]] == sample.token_ids
        assert [logprob for _, logprob, _ in heard[row]] == sample.logprobs
        texts = _texts(heard[row])
        assert "".join(texts) == sample.text and "" not in texts
        # It comes while it is made, not at its end.
        assert len(texts) > 50


def test_a_stop_text_across_tokens_is_never_told(base: Base, tiny: Path) -> None:
    plain, _ = _listened(base, tiny, max_tokens=120)
    text = plain.samples[0][0].text
    stop = next(text[at : at + 5] for at in range(20, 200) if text[at : at + 5].isascii())
    output, heard = _listened(base, tiny, max_tokens=120, stop_strings=("no such text", stop))
    sample = output.samples[0][0]
    assert sample.finish_reason == "stop" and sample.text == text[: text.index(stop)]
    assert "".join(_texts(heard[0])) == sample.text
    assert len(sample.token_ids) < 120


def test_a_stop_token_ends_the_text_before_it(base: Base, tiny: Path) -> None:
    plain, _ = _listened(base, tiny)
    stop = plain.samples[0][0].token_ids[5]
    output, heard = _listened(base, tiny, stop_token_ids=(stop,))
    for row, (sample,) in enumerate(output.samples):
        assert "".join(_texts(heard[row])) == sample.text
    assert output.samples[0][0].finish_reason == "stop"


def test_no_listener_gets_the_same(base: Base, tiny: Path) -> None:
    output, _ = _listened(base, tiny)
    request = ask(tokenizer=tokenizer_of(tiny), weights=make_trainer(base).adapter)
    assert alone(base, request) == output


class _Bytes:
    """Tokens are bytes of UTF-8."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("stops", [(), ("end",), ("\n\n", "é!")])
def test_characters_of_several_tokens_are_told_when_they_are_whole(stops: tuple[str, ...]) -> None:
    text = "naïve – 日本語 \N{PARTY POPPER} en e\n " * 9 + "ends"
    request = ask(tokenizer=_Bytes(), stop_strings=stops, on_token=lambda *_: None)
    stream, sample, told = TextStream(request), Sample(), []
    data = text.encode()
    for number, token in enumerate(data):
        sample.token_ids.append(token)
        if number == len(data) - 1:
            sample.finish_reason, sample.text = "length", text
        told.append(stream.delta(sample) or "")
        assert "\ufffd" not in told[-1]
        assert text.startswith("".join(told))
    assert "".join(told) == text
