"""What the engine asks of a language model: hidden states, a key-value cache, an output head.

Two modules implement `Decoder`: `llama` (our own forward pass for the Llama family) and `pretrained`
(any causal model of transformers). Shapes: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from workers.engine.lora import LoraLinear


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `cap(scale * (h @ weight.T + bias))`.

    `cap(z) = softcap * tanh(z / softcap)`, or z itself where the model has none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V], in float32 at least."""
        out = functional.linear(hidden, self.weight, self.bias)
        if out.dtype in (torch.bfloat16, torch.float16):
            out = out.float()
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out


class Cache(Protocol):
    """Keys and values of a batch of rows that are being continued."""

    def repeat(self, times: int) -> Cache:
        """Each row `times` times, copies side by side."""
        ...

    def select(self, rows: Tensor) -> Cache:
        """Only these rows, in this order."""
        ...


class Decoder(Protocol):
    """A causal language model whose linear layers take adapters."""

    head: Head
    num_parameters: int
    cache_bytes_per_token: int

    @property
    def layers(self) -> Mapping[str, LoraLinear]:
        """The layers that take adapters, by transformers' module path, in the order of the model."""
        ...

    def hidden(self, tokens: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Final hidden states [B * T, H] of `tokens` [B, T], differentiable in the active adapter.

        Rows are padded on the right: attention is causal, so no real position sees the padding and no
        mask is needed. `checkpoint` recomputes each layer in the backward pass to save memory.
        """
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Cache]:
        """The last hidden state [B, H] of each prompt, and a cache with room for `room` more tokens."""
        ...

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Append one token [B] to each row of `cache`, in place; its hidden state [B, H].

        `cache` is one that this decoder made.
        """
        ...
