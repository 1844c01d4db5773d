"""A GGUF made of the tiny model converts to a folder that computes and tokenizes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from workers.engine import gguf as converter
from workers.engine.base import Base, load_base

gguf = pytest.importorskip("gguf", reason="the package gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }[name]


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary head side by side."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _write(tiny: Path, target: Path, pre: str) -> Path:
    config = json.loads((tiny / "config.json").read_text())
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if number < 4 else 1 for number in range(len(words))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for kind, number in (("bos", 1), ("eos", 2), ("pad", 3), ("unk", 0)):
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_chat_template(
        json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    )
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in load_file(tiny / "model.safetensors").items():
        count = heads.get(name.split(".")[-2])
        writer.add_tensor(_gguf_name(name), value if count is None else _interleaved(value, count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The GGUF file and the folder made from it."""
    home = tmp_path_factory.mktemp("a gguf")
    source = _write(tiny, home / "tiny.gguf", "smollm")
    assert converter.convert(source, home / "models" / "tiny")
    return source, home / "models" / "tiny"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what the command line sets for its own process."""
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")


def test_the_folder_computes_the_same(converted: tuple[Path, Path], base: Base) -> None:
    again = load_base(converted[1], dtype="float32")
    tokens = torch.arange(4, 40).unsqueeze(0)
    first, second = (one.decoder.head.logits(one.decoder.hidden(tokens)) for one in (base, again))
    assert torch.allclose(first, second, atol=1e-5)
    assert again.eos_token_ids == (2,) and again.context_length == base.context_length


def test_the_folder_tokenizes_the_same_but_for_digits(
    converted: tuple[Path, Path], tiny: Path
) -> None:
    first, second = (
        Tokenizer.from_file(str(one / "tokenizer.json")) for one in (tiny, converted[1])
    )
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|> naïve"
    assert first.encode(text).ids == second.encode(text).ids
    # The original tokenizer that "smollm" names takes every digit by itself.
    assert second.encode("a  19").tokens == ["a", "Ġ", "Ġ", "1", "9"]
    config = json.loads((converted[1] / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 2048 and config["eos_token"] == "<|im_end|>"
    assert "is_local" not in config
    template = (converted[1] / "chat_template.jinja").read_text()
    assert template == json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]


def test_a_second_conversion_does_nothing(
    converted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = converted
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert converter.convert(source, out) is False
    assert converter.main(["--gguf", str(source), "--out", str(out)]) == 0
    assert "already converted" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_a_folder_of_something_else_is_left_alone(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    arguments = ["--gguf", str(converted[0]), "--out", str(tmp_path / "mine")]
    assert converter.main(arguments) == 1
    assert "--out" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
    assert (
        converter.main(["--gguf", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "x")]) == 1
    )


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader raises
        converter.convert(broken, tmp_path / "models" / "out")
    assert list((tmp_path / "models").iterdir()) == []
