"""Model folders of well-known shapes with random weights, as sharded safetensors in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_COMMON: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
# Llama 3.2 1B and Llama 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "8B": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def write_model(shape: str | dict[str, Any], folder: Path, device: str = "cuda") -> Path:
    """A folder that transformers and the engine load; one file per layer, made on `device`."""
    config = SHAPES[shape] if isinstance(shape, str) else shape
    generator = torch.Generator(device=device).manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, generator=generator, device=device)
        return (0.02 * made).bfloat16().cpu()

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    outer = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": matrix(vocab, hidden),
    }
    parts = [outer, *_layers(config, matrix)]
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number:05}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layers(config: dict[str, Any], matrix: Any) -> Iterator[dict[str, Tensor]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        part = {f"{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            part[f"{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
        yield part
