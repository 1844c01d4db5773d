"""Facts of a folder's tokenizer, and what a broken or changed folder does."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from schemas.errors import SignalError
from tests.unit.text.conftest import write_config
from workers.text.tokenizer import Tokenizer, load_tokenizer


def test_facts(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == 400
    assert tiny.model_max_length == 512
    assert tiny.special_tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "pad": "<|pad|>",
        "unk": "<|endoftext|>",
    }
    assert (tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id, tiny.unk_token_id) == (
        1,
        2,
        3,
        0,
    )
    assert tiny.eos_token_ids == [2]


def test_every_end_of_text_counts(tiny_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_folder, tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(tmp_path).eos_token_ids == [2, 1]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer(tmp_path).eos_token_ids == [2, 0]


def test_a_file_without_names_has_no_special_ids(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {}
    assert tokenizer.eos_token_id is None
    assert tokenizer.eos_token_ids == []
    assert tokenizer.model_max_length is None
    assert tokenizer.chat_template is None


def test_a_special_token_outside_the_vocabulary_is_not_named(
    tiny_folder: Path, tmp_path: Path
) -> None:
    copy_tokenizer(tiny_folder, tmp_path, pad_token="<none>", unk_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    assert tokenizer.pad_token_id is None


def test_a_special_token_of_the_base_vocabulary_is_found_in_text(fallback_folder: Path) -> None:
    tokenizer = load_tokenizer(fallback_folder)
    assert tokenizer.encode("</s>", False) == [2]
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special_tokens=False) == "</s>"


def test_truncation_in_the_file_is_off(trimming_folder: Path) -> None:
    assert len(load_tokenizer(trimming_folder).encode("one two three four five six seven")) > 8


def test_offsets_are_not_trimmed(trimming_folder: Path) -> None:
    text = "a    b"
    _, offsets = load_tokenizer(trimming_folder).encode_with_offsets(text)
    assert offsets[0][0] == 0
    assert offsets[-1][1] == len(text)
    assert all(before[1] == after[0] for before, after in pairwise(offsets))


def test_unknown_ids_stand_for_nothing(tiny: Tokenizer) -> None:
    assert tiny.token_strings([4, 100_000])[1] == ""
    assert tiny.decode([100_000]) == ""


def test_a_lone_surrogate_is_no_text(tiny: Tokenizer) -> None:
    with pytest.raises(SignalError) as caught:
        tiny.encode("a\ud800b", param="text")
    assert (caught.value.code, caught.value.param) == ("validation_error", "text")


def test_it_is_made_once_until_a_file_changes(tiny_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_folder, tmp_path)
    first = load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is first
    os.utime(tmp_path / "tokenizer_config.json", ns=(1, 1))
    assert load_tokenizer(tmp_path) is not first


def test_a_missing_or_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_tokenizer(tmp_path)


def test_the_older_file_of_special_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_folder, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert load_tokenizer(tmp_path).special_tokens == {"eos": "<|im_end|>", "pad": "<|pad|>"}


def copy_tokenizer(source: Path, target: Path, **changes: str | None) -> None:
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    write_config(target, **changes)
