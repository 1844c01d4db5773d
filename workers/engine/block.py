"""One transformer layer of the Llama family as a single differentiable operation.

Forward and backward are written out with the parts of `kernels`, so that autograd records one node per layer:
on a small model its bookkeeping costs as much as the arithmetic. Only the attention product itself is
left to autograd, which knows the device's best kernel. With checkpointing the layer keeps its input alone
and runs forward again before its backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.engine import kernels
from workers.engine.lora import LoraLinear, Pair

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class KeyValues:
    """Keys and values of one layer [rows, kv heads, capacity, head size]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Filled from the left; how far is the cache's to know."""
        self.keys, self.values = keys, values

    def extend(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Write `k` and `v` behind the first `length` positions; all up to their end."""
        end = length + k.shape[2]
        self.keys[:, :, length:end] = k
        self.values[:, :, length:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class Place:
    """Where in the sequence a pass is: rows and columns of positions, rotary tables, attention mask."""

    rows: int
    columns: int
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    causal: bool = False
    length: int = 0


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

    def __call__(self, x: Tensor, place: Place, *, checkpoint: bool = False) -> Tensor:
        """[rows * columns, H] -> the same, differentiable in x and the active adapter."""
        pairs = self._pairs()
        leaves = [leaf for pair in pairs for leaf in (pair or (None, None))]
        out: Tensor = _BlockFunction.apply(x, self, place, checkpoint, *leaves)  # type: ignore[no-untyped-call]
        return out

    def infer(self, x: Tensor, place: Place, store: KeyValues | None) -> Tensor:
        """The same without a derivative, through the keys and values of earlier positions."""
        return self.forward(x, place, self._pairs(), store)[0]

    def _pairs(self) -> list[Pair | None]:
        active = self.linears[0].slot.pairs
        return [None if active is None else active[layer.index] for layer in self.linears]

    def forward(
        self, x: Tensor, place: Place, pairs: Sequence[Pair | None], store: KeyValues | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The layer's output, and what its backward needs."""
        q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self.linears
        a, norm_a = kernels.rms_norm(x, self.gains[0], self.eps)
        q, low_q = kernels.linear(a, q_proj, pairs[0])
        k, low_k = kernels.linear(a, k_proj, pairs[1])
        v, low_v = kernels.linear(a, v_proj, pairs[2])
        attention = _Attention(self, place, q, k, v, store)
        mixed = attention.mixed
        x, low_o = kernels.linear(mixed, o_proj, pairs[3], residual=x)
        m, norm_m = kernels.rms_norm(x, self.gains[1], self.eps)
        gate, low_gate = kernels.linear(m, gate_proj, pairs[4])
        up, low_up = kernels.linear(m, up_proj, pairs[5])
        inner = kernels.silu_gate(gate, up)
        x, low_down = kernels.linear(inner, down_proj, pairs[6], residual=x)
        kept = {
            "inputs": (a, a, a, mixed, m, m, inner),
            "lows": (low_q, low_k, low_v, low_o, low_gate, low_up, low_down),
            "norms": (norm_a, norm_m),
            "attention": attention,
            "gate": (gate, up),
        }
        return x, kept

    def backward(
        self, slope: Tensor, pairs: Sequence[Pair | None], kept: Mapping[str, Any], by_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The derivatives by the input (None unless `by_input`) and by A and B of each projection."""
        leaves: list[Tensor | None] = [None] * (2 * len(PROJECTIONS))

        def through(number: int, slope: Tensor, into: Tensor | None = None) -> Tensor:
            layer, pair = self.linears[number], pairs[number]
            by_low = None if pair is None else torch.mm(slope, pair[1])
            if by_low is not None:
                x, low, scale = kept["inputs"][number], kept["lows"][number], layer.slot.scale
                leaves[2 * number] = kernels.scaled_product(by_low.t(), x, scale)
                leaves[2 * number + 1] = kernels.scaled_product(slope.t(), low, scale)
            if number < 3 and not by_input:
                # Behind q, k and v of the first layer is nothing that is trained.
                return slope
            return kernels.linear_by_input(slope, by_low, layer, pair, into)

        by_gate, by_up = kernels.silu_gate_backward(through(6, slope), *kept["gate"])
        by_m = through(5, by_up, through(4, by_gate))
        slope = slope + kernels.rms_norm_backward(by_m, self.gains[1], kept["norms"][1])
        by_q, by_k, by_v = kept["attention"].backward(through(3, slope))
        by_a = through(2, by_v, through(1, by_k, through(0, by_q)))
        if not by_input:
            return None, leaves
        return slope.add_(kernels.rms_norm_backward(by_a, self.gains[0], kept["norms"][0])), leaves


class _Attention:
    """Rotary positions and the attention product of one pass: flat q, k, v [N, ..] to `mixed` [N, ..]."""

    def __init__(
        self, block: Block, place: Place, q: Tensor, k: Tensor, v: Tensor, store: KeyValues | None
    ) -> None:
        self.block, self.place = block, place
        heads, kv_heads, size = block.heads, block.kv_heads, block.head_size
        q, k = (
            q.view(place.rows, place.columns, heads, size),
            k.view(place.rows, place.columns, kv_heads, size),
        )
        v = v.view(place.rows, place.columns, kv_heads, size)
        self.norms: list[tuple[Tensor, Tensor]] = []
        if block.qk_gains is not None:
            q, norm_q = kernels.rms_norm(q, block.qk_gains[0], block.eps)
            k, norm_k = kernels.rms_norm(k, block.qk_gains[1], block.eps)
            self.norms = [norm_q, norm_k]
        q, k = kernels.rotate(q, place.cos, place.sin), kernels.rotate(k, place.cos, place.sin)
        if store is None:
            self.inputs = [part.requires_grad_() for part in (q, k, v.detach())]
            with torch.enable_grad():
                self.out = self._product(*(part.transpose(1, 2) for part in self.inputs))
        else:
            keys, values = store.extend(k.transpose(1, 2), v.transpose(1, 2), place.length)
            self.out = self._product(q.transpose(1, 2), keys, values)
        self.mixed = self.out.detach().transpose(1, 2).reshape(place.rows * place.columns, -1)

    def _product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.block.heads != self.block.kv_heads
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.place.mask, is_causal=self.place.causal, enable_gqa=grouped
        )

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives by the flat q, k, v."""
        place, block = self.place, self.block
        by_out = slope.view(place.rows, place.columns, block.heads, block.head_size).transpose(1, 2)
        by_q, by_k, by_v = torch.autograd.grad(self.out, self.inputs, by_out)
        by_q, by_k = (
            kernels.rotate(part, place.cos, place.sin, back=True) for part in (by_q, by_k)
        )
        if block.qk_gains is not None:
            by_q = kernels.rms_norm_backward(by_q, block.qk_gains[0], self.norms[0])
            by_k = kernels.rms_norm_backward(by_k, block.qk_gains[1], self.norms[1])
        rows = place.rows * place.columns
        return by_q.reshape(rows, -1), by_k.reshape(rows, -1), by_v.reshape(rows, -1)


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block, place: Place, checkpoint: bool, *leaves: Tensor | None
    ) -> Tensor:
        pairs = _paired(leaves)
        out, kept = block.forward(x, place, pairs)
        ctx.block, ctx.place, ctx.pairs = block, place, pairs
        ctx.kept, ctx.input = (None, x) if checkpoint else (kept, None)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.kept or ctx.block.forward(ctx.input, ctx.place, ctx.pairs)[1]
        # Each layer's memory is free as soon as its backward is done.
        ctx.kept = ctx.input = None
        by_input, leaves = ctx.block.backward(slopes[0], ctx.pairs, kept, ctx.needs_input_grad[0])
        return by_input, None, None, None, *leaves


def _paired(leaves: Sequence[Tensor | None]) -> list[Pair | None]:
    return [
        None if a is None or b is None else (a.detach(), b.detach())
        for a, b in zip(leaves[::2], leaves[1::2], strict=True)
    ]


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
