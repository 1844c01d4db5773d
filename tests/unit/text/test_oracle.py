"""The tokenizers, templates and masks of workers/text against those of transformers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.text.conftest import GENERATION_TEMPLATE, with_template
from workers.text.examples import compile_example
from workers.text.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "The capital of France",
    "  two\n\n\tlines ",
    "héllo 🙂",
    "<|im_end|>\n x",
    "日本",
    "a\x00b",
]
CHATS = [
    [("user", "Hi"), ("assistant", "Hello there.")],
    [("user", " one"), ("assistant", "    x = 1\n"), ("user", "two"), ("assistant", "🙂 três  ")],
    [("user", "one"), ("assistant", "a<|im_end|>\nb")],
]


@pytest.fixture(params=["tiny_folder", "trimming_folder", "fallback_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(request.param)
    assert isinstance(path, Path)
    return path


@lru_cache(maxsize=8)
def oracle_of(folder: Path) -> Any:
    # The class itself, which tokenizer_config.json names: AutoTokenizer imports torch, for seconds.
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_and_texts(folder: Path, add_special_tokens: bool) -> None:
    ours, oracle = load_tokenizer(folder), oracle_of(folder)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens)
        assert ids == oracle.encode(text, add_special_tokens=add_special_tokens)
        assert ours.token_strings(ids) == oracle.convert_ids_to_tokens(ids)
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_facts(folder: Path) -> None:
    ours, oracle = load_tokenizer(folder), oracle_of(folder)
    assert ours.vocab_size == len(oracle)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(oracle, f"{name}_token_id")
        assert ours.special_tokens.get(name) == getattr(oracle, f"{name}_token")
    assert ours.chat_template == oracle.chat_template


@pytest.mark.parametrize("turns", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template(folder: Path, turns: list[tuple[str, str]], prompt: bool) -> None:
    ours, oracle = load_tokenizer(folder), oracle_of(folder)
    text = ours.apply_chat_template(chat(turns), prompt)
    assert text == oracle.apply_chat_template(
        chat(turns), add_generation_prompt=prompt, tokenize=False
    )
    ids = oracle.apply_chat_template(chat(turns), add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(text, False) == ids


words = st.text(st.sampled_from("ab \n🙂é"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_conversation(tiny_folder: Path, turns: list[tuple[str, str]]) -> None:
    ours = with_template(tiny_folder, tiny_folder / "generation", GENERATION_TEMPLATE)
    messages = [
        message
        for user, assistant in turns
        for message in chat([("user", user), ("assistant", assistant)])
    ]
    assert_same_mask(ours, tiny_folder / "generation", messages)


def assert_same_mask(ours: Tokenizer, folder: Path, messages: list[dict[str, str]]) -> None:
    marked = oracle_of(folder).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    row = compile_example(
        {"messages": messages}, ours, max_length=512, vocab_size=512, param="batch_data.0"
    )
    assert [*row.tokens, row.targets[-1]] == marked["input_ids"]
    assert [0, *map(int, row.weights)] == marked["assistant_masks"]
