"""A tiny random Llama with a byte-level tokenizer, written to a folder: the model of every fast test.

Deterministic in `seed`, a few hundred kilobytes, built without torch or transformers, so that tests of
the torch-free parts can use it too. Touches only the folder it is given.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "A researcher's loop runs anywhere and calls four primitives: forward and backward, the step of the "
    "optimizer, sampling, and saving the state. The server keeps every training session in the memory of a "
    "worker. What is the capital of France? The capital of France is Paris. Please answer the question of "
    "the user in one short sentence, and say so when you do not know the answer. Once upon a time a small "
    "model learned to count: one, two, three, four, five, six, seven, eight, nine, ten. It was happy, for "
    "its loss was falling at every step. Then the night came and the machine went to sleep; in the morning "
    "it began where it had stopped, with the same weights and the same moments, as if nothing had happened."
)


def make_tiny_model(
    folder: Path | str,
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 512,
    context: int = 2048,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
) -> Path:
    """Write the model to `folder` (made if missing) and return it as a Path.

    `vocab` must be at least 260 (256 bytes and the special tokens); merges of the built-in text fill it up
    to 512. Beyond that the model has more ids than the tokenizer has tokens, as many real models do.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(path, vocab, context)
    config = _config(hidden, layers, vocab, context, heads, kv_heads)
    _dump(path / "config.json", config)
    _dump(
        path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    )
    save_file(
        _weights(config, np.random.default_rng(seed)),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def _config(
    hidden: int, layers: int, vocab: int, context: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab,
    }


def _weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Wide enough that outputs differ visibly between tokens, unlike the usual std of 0.02.
        return rng.normal(0.0, 1.0 / math.sqrt(columns), (rows, columns)).astype(np.float32)

    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    return weights


def _write_tokenizer(path: Path, vocab: int, context: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _dump(path / "tokenizer_config.json", config)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
