"""One transformer layer of the Llama family as a single differentiable operation.

Forward and backward are written out with the parts of `kernels`, so that autograd records one node per layer:
on a small model its bookkeeping costs as much as the arithmetic. Only the attention product itself is
left to `attention`, which knows the device's best kernel. With checkpointing the layer keeps its input alone
and runs forward again before its backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workers.engine import kernels
from workers.engine.attention import attend
from workers.engine.dropout import Dropout
from workers.engine.linear import LoraLinear, Term
from workers.engine.slab import KeyValues, Step
from workers.engine.spans import Spans, linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Packing:
    """Rows of `lengths` end to end in a training pass: rotary tables [1, T, 1, size], the attention
    kernel, and what adapters drop."""

    lengths: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    kernel: str
    dropout: Dropout | None = None


class Run(NamedTuple):
    """`rows` rows of `length` new tokens each, from token `at` of a pass on, which see the first `shared`
    positions of slot `source` before their own."""

    at: int
    rows: int
    length: int
    source: int = 0
    shared: int = 0


class Block:
    """The frozen parts of a layer; qwen3 normalises its queries and keys (`qk_gains`)."""

    def __init__(
        self,
        linears: Mapping[str, LoraLinear],
        gains: tuple[Tensor, Tensor],
        qk_gains: tuple[Tensor, Tensor] | None,
        eps: Tensor,
        config: Mapping[str, Any],
        head_size: int,
    ) -> None:
        """`linears` by PROJECTIONS; `gains` of the norms before attention and before the feed-forward."""
        self.linears = [linears[name] for name in PROJECTIONS]
        self.gains, self.qk_gains, self.eps = gains, qk_gains, eps
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_size = head_size

    def __call__(self, x: Tensor, packing: Packing, *, checkpoint: bool = False) -> Tensor:
        """[T, H] -> the same, differentiable in x and the active adapter."""
        terms = [layer.term for layer in self.linears]
        leaves = [leaf for term in terms if term is not None for leaf in term.leaves]
        out: Tensor = _BlockFunction.apply(x, self, packing, terms, checkpoint, *leaves)  # type: ignore[no-untyped-call]
        return out

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, step: Step, store: KeyValues, spans: Spans
    ) -> Tensor:
        """The same without a derivative for one more token [R, H] of each row of `store`, which keeps its
        key and value; rotary tables [R, 1, size]."""
        q, k, v = self._projected(x, cos, sin, spans)
        for part, flat in ((k, store.keys), (v, store.values)):
            size = flat.shape[-1]
            flat.view(-1, size).index_copy_(0, step.index, part.reshape(-1, size))
        rows = len(x)
        # The heads that share a key are its queries: nothing is repeated.
        out = functional.scaled_dot_product_attention(
            q.view(rows, self.kv_heads, -1, self.head_size),
            store.keys[:rows, :, : step.end],
            store.values[:rows, :, : step.end],
            attn_mask=step.mask,
        )
        return self._closed(x, out.reshape(rows, -1), spans)

    def fill(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        runs: Sequence[Run],
        store: KeyValues,
        spans: Spans,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for new rows that lie end to end in `x` [T, H]; their keys and values [T, kv heads, size],
        which are not put into `store` yet, besides."""
        q, k, v = self._projected(x, cos, sin, spans)
        parts = [self._attended(q, k, v, run, store) for run in runs]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._closed(x, mixed, spans), k, v

    def _projected(
        self, x: Tensor, cos: Tensor, sin: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Placed queries, keys and values [N, heads, size] of `x` [N, H]."""
        a = kernels.rms_norm(x, self.gains[0], self.eps)[0]
        shape = (len(x), -1, self.head_size)
        q, k, v = (linear(a, layer, spans).contiguous().view(shape) for layer in self.linears[:3])
        q, k, _ = self._placed(q, k, cos, sin)
        return q, k, v

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, run: Run, store: KeyValues) -> Tensor:
        """The attention product [rows * length, heads * size] of one run."""
        at, rows, length, source, shared = run
        q, k, v = (
            part[at : at + rows * length].view(rows, length, -1, self.head_size).transpose(1, 2)
            for part in (q, k, v)
        )
        mask = None
        if shared:
            before = (
                one[source, :, :shared].expand(rows, -1, -1, -1)
                for one in (store.keys, store.values)
            )
            k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
            mask = torch.ones(length, shared + length, dtype=torch.bool, device=q.device).tril(
                shared
            )
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return out.transpose(1, 2).reshape(rows * length, -1)

    def _closed(self, x: Tensor, mixed: Tensor, spans: Spans) -> Tensor:
        """What follows the attention product, without a derivative."""
        _, _, _, o_proj, gate_proj, up_proj, down_proj = self.linears
        x = linear(mixed, o_proj, spans, x)
        m = kernels.rms_norm(x, self.gains[1], self.eps)[0]
        inner = kernels.silu_gate(linear(m, gate_proj, spans), linear(m, up_proj, spans))
        return linear(inner, down_proj, spans, x)

    def forward(
        self, x: Tensor, packing: Packing, terms: Sequence[Term | None]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The layer's output, and what its backward needs."""
        a, norm = kernels.rms_norm(x, self.gains[0], self.eps)
        made = [
            kernels.linear(a, layer, term, packing.dropout)
            for layer, term in zip(self.linears[:3], terms, strict=False)
        ]
        attention = _Attention(self, packing, *(flat for flat, _ in made))
        x, kept = self._feed(x, attention.mixed, terms, packing.dropout)
        kept["adapters"] = [one for _, one in made] + kept["adapters"]
        return x, {**kept, "norm": norm, "attention": attention}

    def _feed(
        self, x: Tensor, mixed: Tensor, terms: Sequence[Term | None], dropout: Dropout | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """What follows the attention product `mixed`: its projection and the feed-forward."""
        _, _, _, o_proj, gate_proj, up_proj, down_proj = self.linears
        x, kept_o = kernels.linear(mixed, o_proj, terms[3], dropout, residual=x)
        m, norm = kernels.rms_norm(x, self.gains[1], self.eps)
        gate, kept_gate = kernels.linear(m, gate_proj, terms[4], dropout)
        up, kept_up = kernels.linear(m, up_proj, terms[5], dropout)
        inner = kernels.silu_gate(gate, up)
        x, kept_down = kernels.linear(inner, down_proj, terms[6], dropout, residual=x)
        adapters = [kept_o, kept_gate, kept_up, kept_down]
        return x, {"adapters": adapters, "feed_norm": norm, "gate": (gate, up)}

    def backward(
        self,
        slope: Tensor,
        packing: Packing,
        terms: Sequence[Term | None],
        kept: Mapping[str, Any],
        by_input: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The derivatives by the input (None unless `by_input`) and by the leaves of each projection."""
        leaves: list[list[Tensor]] = [[] for _ in PROJECTIONS]

        def through(number: int, slope: Tensor, into: Tensor | None = None) -> Any:
            # Behind q, k and v of the first layer is nothing that is trained.
            wanted = by_input or number >= 3
            parts = self.linears[number], terms[number], kept["adapters"][number]
            found, leaves[number] = kernels.linear_backward(
                slope, *parts, packing.dropout, into, wanted
            )
            return found

        by_gate, by_up = kernels.silu_gate_backward(through(6, slope), *kept["gate"])
        by_m = through(5, by_up, through(4, by_gate))
        slope = slope + kernels.rms_norm_backward(by_m, self.gains[1], kept["feed_norm"])
        if not by_input and not any(terms[:4]):
            return None, [leaf for found in leaves for leaf in found]
        by_q, by_k, by_v = kept["attention"].backward(through(3, slope))
        by_a = through(2, by_v, through(1, by_k, through(0, by_q)))
        flat = [leaf for found in leaves for leaf in found]
        if not by_input:
            return None, flat
        return slope.add_(kernels.rms_norm_backward(by_a, self.gains[0], kept["norm"])), flat

    def _placed(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Queries and keys [rows, columns, heads, size] normalised and rotated to their positions."""
        norms: list[tuple[Tensor, Tensor]] = []
        if self.qk_gains is not None:
            q, norm_q = kernels.rms_norm(q, self.qk_gains[0], self.eps)
            k, norm_k = kernels.rms_norm(k, self.qk_gains[1], self.eps)
            norms = [norm_q, norm_k]
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin), norms


class _Attention:
    """Rotary positions and the attention product of a training pass: flat q, k, v [T, ..] to `mixed` [T,
    ..]."""

    def __init__(self, block: Block, packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.block, self.packing = block, packing
        shape = (1, len(q), -1, block.head_size)
        q, k, self.norms = block._placed(q.view(shape), k.view(shape), packing.cos, packing.sin)
        flat = (q[0], k[0], v.view(shape[1:]))
        self.product = attend(packing.kernel, *flat, packing.lengths)
        self.mixed = self.product.out

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives by the flat q, k, v."""
        block, packing = self.block, self.packing
        by_q, by_k, by_v = self.product.backward(slope)
        by_q, by_k = (
            kernels.rotate(part.unsqueeze(0), packing.cos, packing.sin, back=True)
            for part in (by_q, by_k)
        )
        if block.qk_gains is not None:
            by_q = kernels.rms_norm_backward(by_q, block.qk_gains[0], self.norms[0])
            by_k = kernels.rms_norm_backward(by_k, block.qk_gains[1], self.norms[1])
        rows = len(slope)
        return by_q.reshape(rows, -1), by_k.reshape(rows, -1), by_v.reshape(rows, -1)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        packing: Packing,
        terms: Sequence[Term | None],
        checkpoint: bool,
        *_leaves: Tensor,
    ) -> Tensor:
        out, kept = block.forward(x, packing, terms)
        ctx.block, ctx.packing, ctx.terms = block, packing, terms
        ctx.kept, ctx.input = (None, x) if checkpoint else (kept, None)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        block, packing, terms = ctx.block, ctx.packing, ctx.terms
        kept = ctx.kept or block.forward(ctx.input, packing, terms)[1]
        # Each layer's memory is free as soon as its backward is done.
        ctx.kept = ctx.input = None
        found = block.backward(slopes[0], packing, terms, kept, ctx.needs_input_grad[0])
        return found[0], None, None, None, None, *found[1]


def final_norm(x: Tensor, gain: Tensor, eps: Tensor) -> Tensor:
    """The norm behind the last layer, differentiable in x."""
    out: Tensor = _FinalNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
    return out


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: Tensor) -> Tensor:
        out, kept = kernels.rms_norm(x, gain, eps)
        ctx.gain, ctx.kept = gain, kept
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return kernels.rms_norm_backward(slopes[0], ctx.gain, ctx.kept), None, None
