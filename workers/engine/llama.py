"""Our own forward pass for the Llama family (llama, mistral, qwen2, qwen3): half the time of a step on small
models, and a worker starts 3 s sooner since transformers is never imported.

Module names equal transformers' ones, so adapters and exports are the same either way; tests hold both
to each other. What a config asks beyond this is left to `pretrained` (`supports` says no).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from schemas.errors import SignalError
from workers.engine import kernels
from workers.engine.attention import choose_kernel, known_kernel
from workers.engine.block import PROJECTIONS, Block, Packing, Run, final_norm
from workers.engine.decoder import Head, Pass, positions
from workers.engine.linear import LoraLinear, Slot
from workers.engine.memory import layer_bytes
from workers.engine.rope import Rope, head_dim, supports_rope
from workers.engine.slab import KeyValues, Slab, Step
from workers.engine.spans import Span, Spans, Terms, spans_of

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


class Fresh(NamedTuple):
    """A sequence whose keys and values are to be made, for the slots `first` to `last` - 1.

    `tokens` are those to compute; before them come the first `shared` positions of slot `source`, which are
    there already.
    """

    tokens: Sequence[int]
    first: int
    last: int
    terms: Terms = None
    source: int = 0
    shared: int = 0


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
        weights, self._slot = _Weights(config, tensors, slot, kind), slot
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
        cos, sin = self.rope.at(positions(how.lengths, device), max(how.lengths))
        packing = Packing(how.lengths, cos[None], sin[None], kernel, how.dropout)
        x = functional.embedding(tokens.reshape(-1), self.embedding)
        for block in self.blocks:
            x = block(x, packing, checkpoint=how.checkpoint)
        return final_norm(x, self.gain, self.eps)

    def slab(self) -> Slab:
        """An empty cache."""
        return Slab([(block.kv_heads, block.head_size) for block in self.blocks], self.embedding)

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Slab]:
        """See Decoder.prefill."""
        cache, longest = self.slab(), max(len(prompt) for prompt in prompts) + room
        cache.reserve(len(prompts), longest, longest=longest, room=0)
        cache.lengths = [len(prompt) for prompt in prompts]
        terms = self._slot.terms
        return self.fill(
            [Fresh(prompt, row, row + 1, terms) for row, prompt in enumerate(prompts)], cache
        ), cache

    def fill(self, fresh: Sequence[Fresh], cache: Slab) -> Tensor:
        """Make keys and values of sequences in slots of `cache`, which has room for them; the hidden state
        of the last token of each [len(fresh), H]. Neighbours of one length and one source are one product."""
        device = self.embedding.device
        tokens = torch.tensor([token for one in fresh for token in one.tokens], device=device)
        places = [torch.arange(len(one.tokens), device=device) + one.shared for one in fresh]
        longest = max(len(one.tokens) + one.shared for one in fresh)
        cos, sin = self.rope.at(torch.cat(places), longest)
        spans = spans_of([len(one.tokens) for one in fresh], [one.terms for one in fresh])
        runs = _runs(fresh)
        x = functional.embedding(tokens, self.embedding)
        for number, block in enumerate(self.blocks):
            x, k, v = block.fill(x, cos, sin, runs, cache.layers[number], spans)
            _store(fresh, cache, number, k, v)
        ends = torch.tensor([len(one.tokens) for one in fresh], device=device).cumsum(0)
        return self._normed(x[ends - 1])

    def decode(self, tokens: Tensor, cache: Slab, spans: Spans | None = None) -> Tensor:
        """See Decoder.decode; `spans` say which rows have which adapter, by default all the active one."""
        rows, end = len(tokens), max(cache.lengths) + 1
        cache.reserve(rows, end, longest=end, room=0)
        spans = spans or [Span(0, rows, self._slot.terms)]
        lengths = torch.tensor(cache.lengths, device=tokens.device)
        tables = self.rope.at(lengths, end)
        hidden = self.advance(tokens, tables, cache.steps(), cache.layers, spans)
        cache.lengths = [length + 1 for length in cache.lengths]
        return hidden

    def advance(
        self,
        tokens: Tensor,
        tables: tuple[Tensor, Tensor],
        steps: Mapping[torch.Size, Step],
        layers: Sequence[KeyValues],
        spans: Spans,
    ) -> Tensor:
        """Hidden states [R, H] of one more token [R] of each row of `layers`, which keep its keys and values.
        A function of tensors alone: `tables` are rotary ones [R, 1, size], `steps` by the shape of a layer.
        """
        x = functional.embedding(tokens, self.embedding)
        for block, store in zip(self.blocks, layers, strict=True):
            x = block.step(x, *tables, steps[store.keys.shape], store, spans)
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.gain, self.eps)[0]


def _runs(fresh: Sequence[Fresh]) -> list[Run]:
    """Neighbours of one length and one source together."""
    runs, at = [], 0
    for (length, source, shared), group in groupby(
        fresh, lambda one: (len(one.tokens), one.source, one.shared)
    ):
        rows = sum(1 for _ in group)
        runs.append(Run(at, rows, length, source, shared))
        at += rows * length
    return runs


def _store(fresh: Sequence[Fresh], cache: Slab, layer: int, k: Tensor, v: Tensor) -> None:
    """Put what a layer made of each sequence [T, kv heads, size] into its slots."""
    at = 0
    for one in fresh:
        slots, end = slice(one.first, one.last), at + len(one.tokens)
        if one.shared and (one.first, one.last) != (one.source, one.source + 1):
            cache.share(layer, one.source, slots, one.shared)
        keys, values = k[at:end].transpose(0, 1), v[at:end].transpose(0, 1)
        cache.write(layer, slots, one.shared, keys, values)
        at = end


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
