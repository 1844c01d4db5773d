"""Tokenizers built in code: the tiny model's, and kinds that handle spaces and bytes otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors

from tests.support.tiny import CHAT_TEMPLATE, make_tiny_model
from workers.text.tokenizer import Tokenizer, load_tokenizer

GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), vocab=400, context=512)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def trimming_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer as Llama 3 has it: spaces trimmed off the offsets, and a first token added."""
    backend = Backend.from_file(str(tiny_folder / "tokenizer.json"))
    first = ("<|im_start|>", 1)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first]),
        ]
    )
    backend.enable_truncation(8)
    folder = tmp_path_factory.mktemp("trimming")
    backend.save(str(folder / "tokenizer.json"))
    write_config(folder, chat_template=GENERATION_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def fallback_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Llama 2 has it: words begin with ▁, unknown characters become single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/:.,!?"]
    merges = [("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [left + right for left, right in merges]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("fallback")
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}"
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    write_config(folder, chat_template=template, **special)
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    """tokenizer_config.json with the tiny model's special tokens, unless changed."""
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|pad|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def with_template(source: Path, target: Path, template: str) -> Tokenizer:
    """The tokenizer of `source` in `target` with another chat template, in a file of its own."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    write_config(target, chat_template="{{ 'the file goes before this' }}")
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(target)
