"""Our own forward pass for the Llama family (llama, mistral, qwen2, qwen3): half the time of a step on small
models, and a worker starts 3 s sooner since transformers is never imported.

Module names equal transformers' ones, so adapters and exports are the same either way; tests hold both
to each other. What a config asks beyond this is left to `pretrained` (`supports` says no).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from schemas.errors import SignalError
from workers.engine import kernels
from workers.engine.attention import choose_kernel, known_kernel
from workers.engine.block import PROJECTIONS, Block, KeyValues, Packing, Place, final_norm
from workers.engine.decoder import Head, Pass, positions
from workers.engine.linear import LoraLinear, Slot
from workers.engine.memory import layer_bytes
from workers.engine.rope import Rope, head_dim, supports_rope

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def supports(config: Mapping[str, Any]) -> bool:
    """Whether this module computes exactly what `config` (of config.json) describes."""
    return (
        config.get("model_type") in _MODEL_TYPES
        and config.get("hidden_act", "silu") == "silu"
        and config.get("quantization_config") is None
        and not _slides(config)
        and supports_rope(config)
    )


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether some layer attends to a window only."""
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return True
    if config["model_type"] == "mistral":
        return config.get("sliding_window", 4096) is not None
    return bool(config.get("use_sliding_window", False))


class LlamaCache:
    """Keys and values of every layer, filled up to `length`.

    Prompts are padded on the right to `width` positions, so that their pass needs no mask; continuations
    begin at `width`, and the padding between is masked by each row's `lengths` [rows] (None: none is).
    """

    def __init__(
        self, layers: list[KeyValues], length: int, width: int, lengths: Tensor | None
    ) -> None:
        """`length` is `width` at first."""
        self.layers, self.length, self.width, self.lengths = layers, length, width, lengths

    def repeat(self, times: int) -> LlamaCache:
        """Each row `times` times, copies side by side."""
        rows = torch.arange(len(self.layers[0].keys), device=self.layers[0].keys.device)
        return self.select(rows.repeat_interleave(times))

    def select(self, rows: Tensor) -> LlamaCache:
        """Only these rows, in this order."""
        layers = [KeyValues(one.keys[rows], one.values[rows]) for one in self.layers]
        lengths = None if self.lengths is None else self.lengths[rows]
        return LlamaCache(layers, self.length, self.width, lengths)


class _Weights:
    """The state dict while a model is built from it: each tensor is taken once, by its name."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        slot: Slot,
        kind: type[LoraLinear],
    ) -> None:
        self._tensors, self.slot, self.kind = tensors, slot, kind
        # Names alone: a tensor is read when it is taken, so that a layer which keeps fewer bits of it
        # leaves no room to be held for the whole.
        self.left, self.num_parameters = dict.fromkeys(tensors), 0
        any_weight = tensors[next(iter(tensors))]
        wide = torch.float64 if any_weight.dtype == torch.float64 else torch.float32
        self.eps = torch.tensor(
            float(config.get("rms_norm_eps", 1e-6)), dtype=wide, device=any_weight.device
        )
        self.layers: dict[str, LoraLinear] = {}
        self._shapes = _shapes(config)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise SignalError("model_load_failed", f"The model's safetensors hold no {name}.")
        tensor, expected = self._read(name), self._shapes.get(".".join(name.split(".")[-2:]))
        if expected is not None and tuple(tensor.shape) != expected:
            raise SignalError(
                "model_load_failed",
                f"{name} has the shape {tuple(tensor.shape)}; by config.json it is {expected}.",
            )
        return tensor

    def take_head(self, embedding: Tensor, tied: bool) -> Tensor:
        """The output embedding, which a tied model shares with the input."""
        if not tied:
            return self.take("lm_head.weight")
        # Some checkpoints hold the shared matrix twice.
        self.left.pop("lm_head.weight", None)
        return embedding

    def _read(self, name: str) -> Tensor:
        self.left.pop(name)
        tensor = self._tensors[name]
        self.num_parameters += tensor.numel()
        return tensor

    def linear(self, name: str) -> LoraLinear:
        weight = self.take(f"{name}.weight")
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self.left else None
        return self.wrapped(name, self.kind(weight, bias, self.slot, len(self.layers)))

    def wrapped(self, name: str, layer: LoraLinear) -> LoraLinear:
        self.layers[name] = layer
        return layer


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by the last two parts of their names."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    size = head_dim(config)
    keys = (config.get("num_key_value_heads") or heads) * size
    return {
        "embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "q_proj.weight": (heads * size, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, heads * size),
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "q_norm.weight": (size,),
        "k_norm.weight": (size,),
    }


class Llama:
    """The causal language model: a `Decoder`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        slot: Slot,
        kind: type[LoraLinear] = LoraLinear,
    ) -> None:
        """`kind` is the class of the linear layers but the head. `tensors`: the state dict in
        transformers' names; SignalError for a missing or unknown one."""
        weights = _Weights(config, tensors, slot, kind)
        self.embedding = weights.take("model.embed_tokens.weight")
        self.blocks = [
            _block(config, weights, f"model.layers.{number}")
            for number in range(config["num_hidden_layers"])
        ]
        self.gain, self.eps = weights.take("model.norm.weight"), weights.eps
        output = weights.take_head(self.embedding, bool(config.get("tie_word_embeddings")))
        head = LoraLinear(output, None, slot, len(weights.layers))
        self.head = Head(output, layer=weights.wrapped("lm_head", head))
        if weights.left:
            unknown = ", ".join(weights.left)
            raise SignalError(
                "model_load_failed", f"The model has weights of no known use: {unknown}."
            )
        self.layers, self.num_parameters = weights.layers, weights.num_parameters
        self.rope = Rope(config, self.embedding.device, self.embedding.dtype)
        numbers = sum(2 * block.kv_heads * block.head_size for block in self.blocks)
        self.cache_bytes_per_token = numbers * self.embedding.element_size()

    @property
    def kernel(self) -> str:
        """See Decoder.kernel."""
        return choose_kernel(self.embedding.device, self.embedding.dtype)

    def activation_bytes(self, checkpoint: bool) -> float:
        """See Decoder.activation_bytes."""
        itemsize, hidden = self.embedding.element_size(), self.embedding.shape[1]
        inner = self.blocks[0].linears[4].out_features
        wide = self.blocks[0].heads * self.blocks[0].head_size
        layer = layer_bytes(hidden, inner, wide, itemsize)
        return (
            len(self.blocks) * hidden * itemsize + layer if checkpoint else len(self.blocks) * layer
        )

    def hidden(self, tokens: Tensor, how: Pass | None = None) -> Tensor:
        """See Decoder.hidden."""
        how = how or Pass.of(tokens)
        device, dtype = self.embedding.device, self.embedding.dtype
        kernel = how.kernel if known_kernel(how.kernel, device, dtype) else self.kernel
        tables = self.rope.at(positions(how.lengths, device).unsqueeze(0), max(how.lengths))
        packing = Packing(how.lengths, *tables, kernel, how.dropout)
        x = functional.embedding(tokens.reshape(-1), self.embedding)
        for block in self.blocks:
            x = block(x, packing, checkpoint=how.checkpoint)
        return final_norm(x, self.gain, self.eps)

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, LlamaCache]:
        """See Decoder.prefill."""
        tokens, lengths = self._padded(prompts)
        rows, width = tokens.shape
        stores = [self._store(block, rows, width + room) for block in self.blocks]
        ragged = any(len(prompt) != width for prompt in prompts)
        cache = LlamaCache(stores, 0, width, lengths if ragged else None)
        place = Place(rows, width, *self.rope.first(width), causal=width > 1)
        x = self._extend(tokens, place, cache)
        return self._normed(x[torch.arange(rows, device=x.device), lengths - 1]), cache

    def decode(self, tokens: Tensor, cache: LlamaCache) -> Tensor:
        """See Decoder.decode."""
        length, lengths = cache.length, cache.lengths
        if lengths is None:
            cos, sin = self.rope.first(length + 1)
            place = Place(len(tokens), 1, cos[:, -1:], sin[:, -1:], length=length)
        else:
            keys = torch.arange(length + 1, device=tokens.device)
            seen = (keys < lengths.unsqueeze(1)) | (keys >= cache.width)
            positions = (lengths + (length - cache.width)).unsqueeze(1)
            tables = self.rope.at(positions, length + 1)
            place = Place(len(tokens), 1, *tables, seen[:, None, None], length=length)
        return self._normed(self._extend(tokens.unsqueeze(1), place, cache)[:, 0])

    def _extend(self, tokens: Tensor, place: Place, cache: LlamaCache) -> Tensor:
        x = functional.embedding(tokens.reshape(-1), self.embedding)
        for block, store in zip(self.blocks, cache.layers, strict=True):
            x = block.infer(x, place, store)
        cache.length += place.columns
        return x.view(place.rows, place.columns, -1)

    def _normed(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.gain, self.eps)[0]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = prompt
        device = self.embedding.device
        return torch.from_numpy(tokens).to(device), torch.tensor(lengths, device=device)

    def _store(self, block: Block, rows: int, capacity: int) -> KeyValues:
        shape = (rows, block.kv_heads, capacity, block.head_size)
        return KeyValues(self.embedding.new_empty(shape), self.embedding.new_empty(shape))


def _block(config: Mapping[str, Any], weights: _Weights, name: str) -> Block:
    linears = {
        leaf: weights.linear(f"{name}.{'mlp' if number > 3 else 'self_attn'}.{leaf}")
        for number, leaf in enumerate(PROJECTIONS)
    }
    norms = [f"{name}.input_layernorm.weight", f"{name}.post_attention_layernorm.weight"]
    gains = weights.take(norms[0]), weights.take(norms[1])
    qk_gains = None
    if config["model_type"] == "qwen3":
        attention = f"{name}.self_attn"
        qk_gains = (
            weights.take(f"{attention}.q_norm.weight"),
            weights.take(f"{attention}.k_norm.weight"),
        )
    return Block(linears, gains, qk_gains, weights.eps, config, head_dim(config))
