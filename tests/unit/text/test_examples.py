"""Examples of one sequence as rows: texts, conversations and token ids."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SignalError
from workers.text.batches import compile_batch
from workers.text.examples import compile_example
from workers.text.rows import Row, pack_rows
from workers.text.tokenizer import Tokenizer, load_tokenizer

VOCAB = 400
USER = {"role": "user", "content": "Two?"}


def compiled(example: dict[str, Any], tokenizer: Tokenizer, max_length: int = 64) -> Row:
    return compile_example(
        example, tokenizer, max_length=max_length, vocab_size=VOCAB, param="batch_data.0"
    )


def lists(row: Row) -> tuple[list[int], list[int], list[float]]:
    return list(row.tokens), list(row.targets), list(row.weights)


def refused(example: dict[str, Any], tokenizer: Tokenizer, max_length: int = 64) -> tuple[str, str]:
    with pytest.raises(SignalError) as caught:
        compiled(example, tokenizer, max_length)
    return caught.value.code, str(caught.value.param)


def test_text_counts_every_token_after_the_first(tiny: Tokenizer) -> None:
    ids = tiny.encode("The capital of France")
    assert lists(compiled({"text": "The capital of France"}, tiny)) == (
        ids[:-1],
        ids[1:],
        [1.0] * (len(ids) - 1),
    )


def test_text_gets_the_special_tokens_that_the_tokenizer_adds(trimming_folder: Path) -> None:
    row = compiled({"text": "a"}, load_tokenizer(trimming_folder))
    assert row.tokens[0] == 1
    assert len(row) == 1


def test_messages_count_the_assistant_alone(tiny: Tokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "  two 🙂  "}, USER]
    row = compiled({"messages": messages}, tiny)
    counted = [token for token, weight in zip(row.targets, row.weights, strict=True) if weight]
    assert tiny.decode(counted, skip_special_tokens=False) == "  two 🙂  <|im_end|>"
    assert [*row.tokens, row.targets[-1]] == tiny.encode(tiny.apply_chat_template(messages), False)


def test_spaces_that_a_post_processor_trims_off_the_offsets_count(trimming_folder: Path) -> None:
    tokenizer = load_tokenizer(trimming_folder)
    messages = [USER, {"role": "assistant", "content": "    x = 1  "}]
    row = compiled({"messages": messages}, tokenizer)
    counted = [token for token, weight in zip(row.targets, row.weights, strict=True) if weight]
    assert tokenizer.decode(counted, skip_special_tokens=False) == "    x = 1  <|im_end|>"


def test_messages_get_no_special_token_twice(fallback_folder: Path) -> None:
    messages = [USER, {"role": "assistant", "content": "two"}]
    row = compile_example(
        {"messages": messages},
        load_tokenizer(fallback_folder),
        max_length=64,
        vocab_size=1000,
        param="batch_data.0",
    )
    assert list(row.tokens).count(1) == 1


def test_tokens_without_targets_predict_the_next(tiny: Tokenizer) -> None:
    assert lists(compiled({"tokens": [5, 6, 7]}, tiny)) == ([5, 6, 7], [6, 7, 0], [1.0, 1.0, 0.0])
    weighted: dict[str, Any] = {"tokens": [5, 6, 7], "weights": [0, -2.5, 1]}
    assert lists(compiled(weighted, tiny))[2] == [0.0, -2.5, 0.0]


def test_tokens_with_targets_stay_as_they_are(tiny: Tokenizer) -> None:
    example: dict[str, Any] = {"tokens": [5, 6], "targets": [9, 8]}
    assert lists(compiled(example, tiny)) == ([5, 6], [9, 8], [1.0, 1.0])
    example = {"tokens": [5], "targets": [399], "weights": [0.5]}
    assert lists(compiled(example, tiny)) == ([5], [399], [0.5])


@pytest.mark.parametrize(
    ("example", "code", "field"),
    [
        ({"tokens": [1, 2, VOCAB]}, "token_out_of_range", "tokens.2"),
        ({"tokens": [1, -1]}, "token_out_of_range", "tokens.1"),
        ({"tokens": [1, 2**40]}, "token_out_of_range", "tokens.1"),
        ({"tokens": [1, 2.0]}, "validation_error", "tokens.1"),
        ({"tokens": [True, 2]}, "validation_error", "tokens.0"),
        ({"tokens": [1, "2"]}, "validation_error", "tokens.1"),
        ({"tokens": [1, None]}, "validation_error", "tokens.1"),
        ({"tokens": [1, 2], "targets": [1, VOCAB]}, "token_out_of_range", "targets.1"),
        ({"tokens": [1, 2], "targets": [1]}, "validation_error", "targets"),
        ({"tokens": [1, 2], "weights": [1.0]}, "validation_error", "weights"),
        ({"tokens": [1, 2], "weights": [1.0, math.nan]}, "validation_error", "weights.1"),
        ({"tokens": [1, 2], "weights": [1e39, 1.0]}, "validation_error", "weights.0"),
        ({"tokens": [1, 2], "weights": [0, 1]}, "no_target_tokens", "weights"),
        ({"tokens": [1]}, "no_target_tokens", "tokens"),
        ({"text": "a"}, "no_target_tokens", "text"),
        ({"text": "a\udc00"}, "validation_error", "text"),
        ({"messages": [USER]}, "no_target_tokens", "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "validation_error", "messages"),
    ],
)
def test_wrong_examples(example: dict[str, Any], code: str, field: str, tiny: Tokenizer) -> None:
    assert refused(example, tiny) == (code, f"batch_data.0.{field}")


def test_too_long(tiny: Tokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "two " * 9}]
    assert refused({"tokens": [1] * 9}, tiny, 8) == ("sequence_too_long", "batch_data.0.tokens")
    assert refused({"text": "one two three"}, tiny, 4) == ("sequence_too_long", "batch_data.0.text")
    assert refused({"messages": messages}, tiny, 8)[1] == "batch_data.0.messages"
    assert len(compiled({"tokens": [1] * 8}, tiny, 8)) == 8


def test_a_tokenizer_with_more_tokens_than_the_model(tiny: Tokenizer) -> None:
    with pytest.raises(SignalError) as caught:
        compile_example(
            {"text": "The cat"}, tiny, max_length=9, vocab_size=10, param="batch_data.0"
        )
    assert caught.value.code == "token_out_of_range"


def test_a_batch_names_every_wrong_example(tiny: Tokenizer) -> None:
    examples: list[dict[str, Any]] = [
        {"tokens": [1, VOCAB]},
        {"tokens": [1, 2]},
        {"messages": [USER]},
    ]
    with pytest.raises(SignalError) as caught:
        compile_batch(examples, tiny, max_length=64, vocab_size=VOCAB)
    found = [(detail.param, detail.code) for detail in caught.value.details]
    assert found == [
        ("batch_data.0.tokens.1", "token_out_of_range"),
        ("batch_data.2.messages", "no_target_tokens"),
    ]
    assert caught.value.code == "validation_error"


def test_a_batch(tiny: Tokenizer) -> None:
    examples: list[dict[str, Any]] = [{"tokens": [1, 2]}, {"text": "one two"}]
    rows = compile_batch(examples, tiny, max_length=64, vocab_size=VOCAB)
    assert [lists(row) for row in rows] == [lists(compiled(example, tiny)) for example in examples]


def test_a_large_batch_is_one_pass(tiny: Tokenizer) -> None:
    """No bound on time, which a shared machine does not keep: the largest batch must simply go through."""
    rng = random.Random(0)
    examples = [{"tokens": rng.choices(range(VOCAB), k=4096)} for _ in range(64)]
    rows = compile_batch(examples, tiny, max_length=4096, vocab_size=VOCAB)
    assert sum(pack_rows(rows)["lengths"]) == 64 * 4096
