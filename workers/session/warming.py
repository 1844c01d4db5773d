"""Makes a worker warm: everything imported, every primitive run once on a throw-away model of a few numbers.

What a process pays once (imports, thread pools, first calls of kernels) is paid before a run waits for it.
Holds no device memory: it runs on the CPU whatever the slot is, and lets go of everything.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.certificate import certificate
from workers.engine.lora import LoraSpec
from workers.engine.sampler import SampleParams
from workers.engine.trainer import Trainer
from workers.session import arrival  # noqa: F401  what a first run imports is imported here
from workers.text.rows import Row

_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "vocab_size": 32,
    "eos_token_id": 1,
}


class _NoText:
    """Stands in for a tokenizer: the dry pass throws its text away."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Nothing."""
        return ""


def warm_up() -> None:
    """A dry pass of every primitive."""
    with tempfile.TemporaryDirectory(prefix="signal-warm-") as folder:
        _write_model(Path(folder))
        base = load_base(folder)
        trainer = Trainer(base, LoraSpec(r=2, alpha=2.0), AdamWSettings())
        row = Row(array("i", range(8)), array("i", range(1, 9)), array("f", [1.0] * 8))
        trainer.forward_backward([row], "causal_lm", {})
        trainer.optim_step()
        params = SampleParams(
            max_tokens=2,
            temperature=1.0,
            top_p=0.9,
            top_k=4,
            stop_strings=(),
            stop_token_ids=(),
            n=1,
        )
        trainer.sample([[1, 2]], params, _NoText(), lambda: False, (0, 1))
        state = trainer.capture()
        certificate(state)
        trainer.restore(state)


def _write_model(folder: Path) -> None:
    hidden, inner = 8, 16
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    layer = "model.layers.0."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"{layer}self_attn.{name}.weight"] = (hidden, hidden)
    for name in ("gate_proj", "up_proj"):
        shapes[f"{layer}mlp.{name}.weight"] = (inner, hidden)
    shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}{name}.weight"] = (hidden,)
    tensors = {name: torch.full(shape, 0.1) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
