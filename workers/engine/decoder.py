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

from workers.engine.dropout import Dropout
from workers.engine.linear import LoraLinear, Term
from workers.engine.spans import Span, Spans, Terms, add_term, product


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `cap(scale * (h @ weight.T + bias + adapter(h)))`.

    `cap(z) = softcap * tanh(z / softcap)`, or z itself where the model has none. `layer` is the wrapped
    output layer of a model whose unembedding takes an adapter.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    layer: LoraLinear | None = None

    @property
    def term(self) -> Term | None:
        """What the active adapter adds."""
        return None if self.layer is None else self.layer.term

    @property
    def leaves(self) -> list[Tensor]:
        """What of the head is trained: by the active adapter, or with all parameters of the model."""
        if self.term is not None:
            return self.term.leaves
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own if self.weight.requires_grad else []

    @property
    def trained(self) -> bool:
        """Whether gradients by the head itself are needed."""
        return bool(self.leaves)

    def logits(self, hidden: Tensor, spans: Spans | None = None) -> Tensor:
        """[N, H] -> [N, V], in float32 at least; `spans` say which rows have which adapter, by default all
        the active one."""
        if spans is None:
            out = functional.linear(hidden, self.weight, self.bias)
            spans = [Span(0, len(hidden), self._terms)]
        else:
            out = product(hidden, self.weight)
            out = out if self.bias is None else out.add_(self.bias)
        for span in spans:
            term = None if self.layer is None else span.term(self.layer)
            if term is not None:
                add_term(out, hidden, span, term)
        if out.dtype in (torch.bfloat16, torch.float16):
            # A row's logits lie side by side, however the product was made.
            out = out.to(torch.float32, memory_format=torch.contiguous_format)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out

    @property
    def _terms(self) -> Terms:
        return None if self.layer is None else self.layer.slot.terms

    def backward(self, by_product: Tensor, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The derivatives by `hidden` [n, H] and by the term's leaves, from that [n, V] by the product."""
        slope, term = by_product.to(hidden.dtype), self.term
        by_hidden = slope @ self.weight
        if term is None:
            own = [slope.t() @ hidden, slope.sum(0)] if self.weight.requires_grad else []
            return by_hidden, own[: len(self.leaves)]
        by_low = slope @ term.b
        leaves = [
            term.scale * (by_low.t() @ hidden),
            term.scale * (slope.t() @ (hidden @ term.a.t())),
        ]
        return by_hidden.addmm_(by_low, term.a, alpha=term.scale), leaves


@dataclass(frozen=True)
class Pass:
    """How tokens are laid out in a pass and computed: rows of `lengths` lie end to end.

    `kernel` is one of the decoder's own, "" its choice. `checkpoint` recomputes each layer in the backward
    pass to save memory. `dropout` is what adapters drop.
    """

    lengths: tuple[int, ...]
    kernel: str = ""
    checkpoint: bool = False
    dropout: Dropout | None = None

    @classmethod
    def of(cls, tokens: Tensor) -> Pass:
        """Rows of one length, as they are in `tokens` [B, T]."""
        rows, columns = tokens.shape
        return cls((columns,) * rows)


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[T] each token's place in its row."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


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

    @property
    def kernel(self) -> str:
        """The name of the attention kernel that it chooses here."""
        ...

    def activation_bytes(self, checkpoint: bool) -> float:
        """About how many bytes per token a training pass keeps, with or without recomputation of layers."""
        ...

    def hidden(self, tokens: Tensor, how: Pass | None = None) -> Tensor:
        """Final hidden states [T, H] of `tokens` (T of them in any shape), differentiable in the active
        adapter. Rows lie end to end and do not see each other; without `how` they are the rows of `tokens`.
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
