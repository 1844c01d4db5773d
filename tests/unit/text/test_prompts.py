"""Prompts of the three kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SignalError
from workers.text.prompts import render_prompts
from workers.text.tokenizer import Tokenizer, load_tokenizer

HI = [{"role": "user", "content": "Hi"}]


def rendered(prompts: list[Any], tokenizer: Tokenizer, max_length: int = 64) -> list[list[int]]:
    return render_prompts(prompts, tokenizer, max_length=max_length, vocab_size=400)


def test_a_text_gets_the_tokenizers_special_tokens(trimming_folder: Path) -> None:
    tokenizer = load_tokenizer(trimming_folder)
    assert rendered(["a b"], tokenizer) == [[1, *tokenizer.encode("a b", False)]]


def test_messages_get_the_generation_prompt_and_no_more(trimming_folder: Path) -> None:
    tokenizer = load_tokenizer(trimming_folder)
    ids = rendered([HI], tokenizer)[0]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(1) == 2


def test_ids_stay_as_they_are(tiny: Tokenizer) -> None:
    assert rendered([[5, 2, 0], [399]], tiny) == [[5, 2, 0], [399]]


def test_every_wrong_prompt_is_named(tiny: Tokenizer) -> None:
    with pytest.raises(SignalError) as caught:
        rendered([[1, 400], [1], [1] * 9, [3, True]], tiny, max_length=8)
    assert [(detail.param, detail.code) for detail in caught.value.details] == [
        ("prompts.0.1", "token_out_of_range"),
        ("prompts.2", "sequence_too_long"),
        ("prompts.3.1", "validation_error"),
    ]


@pytest.mark.parametrize(
    ("prompt", "code"), [("", "validation_error"), ("\ud800", "validation_error")]
)
def test_a_text_that_is_none(prompt: str, code: str, tiny: Tokenizer) -> None:
    with pytest.raises(SignalError) as caught:
        rendered([prompt], tiny)
    assert (caught.value.code, caught.value.param) == (code, "prompts.0")
