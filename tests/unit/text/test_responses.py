"""A prompt and its response: the boundary is exact, and prompts are never counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SignalError
from tests.unit.text.conftest import with_template
from workers.text.examples import Model
from workers.text.prompts import render_prompt
from workers.text.responses import Answered, answered, answered_row, prompt_ids
from workers.text.tokenizer import Tokenizer, load_tokenizer

VOCAB = 400
USER = {"role": "user", "content": "Two?"}
SAID = {"role": "assistant", "content": "two"}


def made(prompt: Any, response: Any, tokenizer: Tokenizer, max_length: int = 64) -> Answered:
    model = Model(tokenizer, max_length, 1000)
    return answered(prompt, prompt_ids(prompt, model, "p"), response, model, "r")


def counted(found: Answered) -> list[int]:
    pairs = zip(found.response, found.counted, strict=True)
    return [token for token, weight in pairs if weight]


def test_a_text_ends_with_the_end_of_text(tiny: Tokenizer) -> None:
    found = made("The capital of", " France", tiny)
    assert list(found.prompt) == tiny.encode("The capital of")
    assert tiny.decode(found.response, skip_special_tokens=False) == " France<|im_end|>"
    assert list(found.counted) == [1.0] * len(found.response)
    again = made("The capital of", " France<|im_end|>", tiny)
    assert list(again.response) == list(found.response)


def test_a_text_answers_messages_as_the_assistants_turn(tiny: Tokenizer) -> None:
    found = made([USER], "  two 🙂 ", tiny)
    text = tiny.apply_chat_template([USER], True)
    assert list(found.prompt) == tiny.encode(text, False)
    assert tiny.decode(counted(found), skip_special_tokens=False) == "  two 🙂 <|im_end|>"
    assert len(counted(found)) == len(found.response)


def test_messages_answer_messages(tiny: Tokenizer) -> None:
    turns = [SAID, USER, SAID]
    found = made([USER, SAID, USER], turns, tiny, 128)
    text = tiny.decode([*found.prompt, *found.response], skip_special_tokens=False)
    assert text == tiny.apply_chat_template([USER, SAID, USER, *turns]).rstrip()
    # The prompt's own assistant turn and the user's words in between do not count.
    assert tiny.decode(counted(found), skip_special_tokens=False) == "two<|im_end|>" * 2


def test_ids_answer_anything_as_they_are(tiny: Tokenizer) -> None:
    for prompt in ("The capital", [USER], [5, 6, 7]):
        found = made(prompt, [9, 8, 2], tiny)
        ids = render_prompt(prompt, tiny, max_length=64, vocab_size=VOCAB, param="")
        assert (list(found.prompt), list(found.response)) == (ids, [9, 8, 2])
    assert list(made([5, 6], "one", tiny).prompt) == [5, 6]


def test_a_token_across_the_boundary_is_split(tiny: Tokenizer) -> None:
    """ "The c" + "apital": as one text the word is one token, which would hide the boundary."""
    whole = tiny.encode("The capital")
    prompt = tiny.encode("The c")
    assert whole[: len(prompt)] != prompt
    found = made("The c", "apital", tiny)
    assert list(found.prompt) == prompt
    assert tiny.decode(found.response) == "apital"


words = st.text(st.sampled_from("ab \n🙂éThe"), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None)
@given(prompt=words, response=words, chat=st.booleans())
def test_the_prompt_is_what_sample_makes_of_it(
    tiny: Tokenizer, prompt: str, response: str, chat: bool
) -> None:
    asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
    found = made(asked, response, tiny, 256)
    assert list(found.prompt) == render_prompt(
        asked, tiny, max_length=256, vocab_size=1000, param=""
    )
    text = tiny.decode(found.response, skip_special_tokens=False)
    assert text == response + "<|im_end|>"
    assert all(found.counted)


def test_tokenizers_that_mark_the_beginning_of_a_text(fallback_folder: Path) -> None:
    tokenizer = load_tokenizer(fallback_folder)
    found = made("one", " two", tokenizer)
    assert list(found.prompt) == tokenizer.encode("one")
    # As in the whole text: the words' own mark, not that of a text's beginning.
    assert [*found.prompt, *found.response] == tokenizer.encode("one two</s>")


def test_the_row_counts_the_response_alone(tiny: Tokenizer) -> None:
    found = made([5, 6, 7], [9, 8], tiny)
    row = answered_row(found, {"logprobs": [-1.0, -2.0]}, {"reward": 3.0}, number=4)
    assert (list(row.tokens), list(row.targets)) == ([5, 6, 7, 9], [6, 7, 9, 8])
    assert list(row.weights) == [0.0, 0.0, 1.0, 1.0]
    assert list(row.arrays["logprobs"]) == [0.0, 0.0, -1.0, -2.0]
    assert (row.values, row.example, row.trained) == ({"reward": 3.0}, 4, True)


@pytest.mark.parametrize(
    ("prompt", "response", "code", "param"),
    [
        ("a", [SAID], "validation_error", "r"),
        ([5], [SAID], "validation_error", "r"),
        ([USER], [USER], "validation_error", "r.0.role"),
        ([5], [VOCAB * 3], "token_out_of_range", "r.0"),
        ([VOCAB * 3], [5], "token_out_of_range", "p.0"),
        ([5] * 64, [5], "sequence_too_long", "p"),
        ([5] * 60, [5] * 5, "sequence_too_long", "r"),
        ("a\udc00", "b", "validation_error", "p"),
        ("a", "b\udc00", "validation_error", "r"),
    ],
)
def test_what_is_refused(
    tiny: Tokenizer, prompt: Any, response: Any, code: str, param: str
) -> None:
    with pytest.raises(SignalError) as caught:
        made(prompt, response, tiny)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_template_that_does_not_continue_its_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(SignalError) as caught:
        made([USER], "two", with_template(tiny_folder, tmp_path / "unstable", template))
    assert caught.value.code == "chat_template_not_prefix_stable"
