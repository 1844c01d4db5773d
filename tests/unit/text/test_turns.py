"""Where the assistant's words begin and end, under templates of several families."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import SignalError
from tests.unit.text.conftest import with_template
from workers.text.tokenizer import Tokenizer, load_tokenizer
from workers.text.turns import assistant_spans

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Two?"}
ONE = {"role": "assistant", "content": "one "}
TWO = {"role": "assistant", "content": "two\n\n"}

TRIMS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen 3: only the last turn keeps its (empty) reasoning.
REASONS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2: a system turn is put before the first message.
DEFAULTS = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek R1: the generation prompt opens a block that a finished turn does not have.
OPENS = DEFAULTS.replace("assistant\n'", "assistant\n<think>\n'")
LOOKS_AHEAD = "{{ messages[0]['role'] }}" + PLAIN


def spoken(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[str]:
    text, spans = assistant_spans(messages, tokenizer, param="messages")
    return [text[start:end] for start, end in spans]


def test_words_and_the_token_that_ends_the_turn(tiny: Tokenizer) -> None:
    assert spoken([SYSTEM, USER, ONE, USER, TWO], tiny) == ["one <|im_end|>", "two\n\n<|im_end|>"]


def test_turns_in_a_row_and_a_first_turn(tiny: Tokenizer) -> None:
    assert spoken([ONE, TWO, USER], tiny) == ["one <|im_end|>", "two\n\n<|im_end|>"]


def test_no_turn(tiny: Tokenizer) -> None:
    assert spoken([SYSTEM, USER], tiny) == []


def test_words_that_hold_an_end_mark(tiny: Tokenizer) -> None:
    turn = {"role": "assistant", "content": "a<|im_end|>\n"}
    assert spoken([USER, turn], tiny) == ["a<|im_end|>\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (TRIMS, ["one<|im_end|>", "two<|im_end|>"]),
        (DEFAULTS, ["one <|im_end|>", "two\n\n<|im_end|>"]),
        (PLAIN, ["one \n", "two\n\n\n"]),
    ],
)
def test_templates(template: str, turns: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_folder, tmp_path, template)
    assert spoken([USER, ONE, USER, TWO], tokenizer) == turns


def test_a_template_without_a_generation_prompt(fallback_folder: Path) -> None:
    tokenizer = load_tokenizer(fallback_folder)
    assert spoken([USER, ONE, USER, TWO], tokenizer) == [" one </s>", " two </s>"]


@pytest.mark.parametrize(
    ("template", "messages", "param", "reason"),
    [
        (
            REASONS,
            [USER, ONE, USER, TWO],
            "m.1",
            "Send rows that end with their only assistant turn",
        ),
        (OPENS, [USER, ONE], "m.1", "does not continue its own generation prompt"),
        (DEFAULTS, [ONE, USER], "m.0", "put a system or user message before it"),
        (LOOKS_AHEAD, [ONE, USER], "m.0", "put a system or user message before it"),
    ],
)
def test_a_template_that_rewrites_is_refused(
    template: str,
    messages: list[dict[str, str]],
    param: str,
    reason: str,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    tokenizer = with_template(tiny_folder, tmp_path, template)
    with pytest.raises(SignalError, match=reason) as caught:
        assistant_spans(messages, tokenizer, param="m")
    assert caught.value.code == "chat_template_not_prefix_stable"
    assert caught.value.param == param


def test_the_last_turn_alone_is_exact_where_earlier_ones_are_rewritten(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_folder, tmp_path, REASONS)
    assert spoken([USER, ONE], tokenizer) == ["<think>\n\n</think>\n\none <|im_end|>"]


def test_a_role_that_the_template_refuses(fallback_folder: Path) -> None:
    with pytest.raises(SignalError, match="Only user and assistant") as caught:
        assistant_spans([SYSTEM, ONE], load_tokenizer(fallback_folder), param="m")
    assert (caught.value.code, caught.value.param) == ("chat_template_error", "m")


def test_no_template(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    with pytest.raises(SignalError) as caught:
        assistant_spans([USER, ONE], load_tokenizer(tmp_path), param="m")
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "m")
