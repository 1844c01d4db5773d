"""Causal attention over rows that lie end to end: no row sees another, and nothing is computed for padding.

Three kernels, each with its backward, over flat queries [T, heads, size] and keys and values [T, kv heads,
size]. `lengths` are those of the rows, whose sum is T.

- "segments": torch's attention for each run of rows of one length, differentiated by autograd;
- "blocks": the same forward, the backward written out in blocks of queries. On a CPU in 16 bits torch's own
  backward takes three times as long for rows of up to a few hundred tokens;
- "varlen": one FlashAttention call for all rows (torch.nn.attention.varlen), on a GPU in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

_HALVES = (torch.bfloat16, torch.float16)
# Queries of one block: smaller ones compute less beyond the diagonal, larger ones make fewer calls.
_BLOCK = 128
# From here on the written-out backward is no faster than torch's.
_LONGEST_BLOCKED = 1024
_AMPERE = (8, 0)


class Attention(Protocol):
    """One pass of attention; `out` is flat [T, heads * size]."""

    out: Tensor

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives by q, k and v, in their shapes, from that by `out`."""
        ...


def choose_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest kernel that runs here."""
    if dtype not in _HALVES:
        return "segments"
    if device.type == "cpu":
        return "blocks"
    fused = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE
    return "varlen" if fused else "segments"


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Attention:
    """Attention by the kernel of this name."""
    made: Attention = _KERNELS[kernel](q, k, v, lengths)
    return made


def known_kernel(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel that a plan names runs here."""
    return name in _KERNELS and (name != "varlen" or choose_kernel(device, dtype) == name)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, rows, length) of each run of rows that are equally long."""
    at = 0
    for length, group in groupby(lengths):
        rows = sum(1 for _ in group)
        yield at, rows, length
        at += rows * length


def _cut(x: Tensor, run: tuple[int, int, int]) -> Tensor:
    """The run's part of `x` [T, heads, size] as [rows, heads, length, size], sharing memory."""
    at, rows, length = run
    return x[at : at + rows * length].view(rows, length, *x.shape[1:]).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """The reverse: [rows, heads, length, size] to [rows * length, heads, size]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    causal = q.shape[2] > 1
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


class _Segments:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        self._passes: list[tuple[list[Tensor], Tensor]] = []
        self._runs = list(_runs(lengths))
        for run in self._runs:
            # Leaves of their own: a derivative by a slice would fill the whole of T for each.
            leaves = [_cut(x, run).detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                self._passes.append((leaves, _product(*leaves)))
        parts = [_flat(made.detach()) for _, made in self._passes]
        self.out = _joined(parts).view(len(q), -1)

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for run, (leaves, made) in zip(self._runs, self._passes, strict=True):
            heads, size = leaves[0].shape[1], leaves[0].shape[3]
            by_out = _cut(slope.view(len(slope), heads, size), run)
            parts = torch.autograd.grad(made, leaves, by_out)
            found.append([_flat(part) for part in parts])
        by_q, by_k, by_v = (_joined(parts) for parts in zip(*found, strict=True))
        return by_q, by_k, by_v


class _Blocks:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        if max(lengths) > _LONGEST_BLOCKED:
            self._inner: _Segments | None = _Segments(q, k, v, lengths)
            self.out = self._inner.out
            return
        self._inner, self._inputs, self._runs = None, (q, k, v), list(_runs(lengths))
        parts = [_flat(_product(*(_cut(x, run) for x in (q, k, v)))) for run in self._runs]
        self.out = _joined(parts).view(len(q), -1)

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._inner is not None:
            return self._inner.backward(slope)
        slope = slope.view(self._inputs[0].shape)
        whole = (*self._inputs, slope)
        found = [
            [_flat(part) for part in _blocked(*[_cut(x, run) for x in whole])] for run in self._runs
        ]
        by_q, by_k, by_v = (_joined(parts) for parts in zip(*found, strict=True))
        return by_q, by_k, by_v


def _blocked(q: Tensor, k: Tensor, v: Tensor, by_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives for q [rows, heads, L, size] and k, v [rows, kv heads, L, size]; heads of one key
    lie side by side, so that each group of them is one product."""
    rows, heads, length, size = q.shape
    pairs, group, scale = rows * k.shape[1], heads // k.shape[1], size**-0.5
    keys, values = k.reshape(pairs, length, size), v.reshape(pairs, length, size)
    by_keys, by_values = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    if length > _BLOCK:
        # Several blocks add to a key: their sum is kept in more bits than it is given in.
        by_keys, by_values = by_keys.float(), by_values.float()
    by_queries = []
    for begin in range(0, length, _BLOCK):
        end = min(length, begin + _BLOCK)
        shape = (pairs, group * (end - begin), size)
        queries = q[:, :, begin:end].reshape(shape)
        slope = by_out[:, :, begin:end].reshape(shape)
        mask = _mask(begin, end, group, q.dtype)
        scores = torch.baddbmm(mask, queries, keys[:, :end].transpose(1, 2), alpha=scale)
        shares = torch.softmax(scores, -1)
        by_shares = torch.bmm(slope, values[:, :end].transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_shares, shares, -1, shares.dtype)
        by_values[:, :end] += torch.bmm(shares.transpose(1, 2), slope)
        by_keys[:, :end].add_(torch.bmm(by_scores.transpose(1, 2), queries), alpha=scale)
        made = torch.bmm(by_scores, keys[:, :end]).mul_(scale)
        by_queries.append(made.view(rows, heads, end - begin, size))
    joined = by_queries[0] if len(by_queries) == 1 else torch.cat(by_queries, 2)
    return joined, by_keys.to(k.dtype).view(k.shape), by_values.to(v.dtype).view(v.shape)


@lru_cache(maxsize=64)
def _mask(begin: int, end: int, group: int, dtype: torch.dtype) -> Tensor:
    """[group * (end - begin), end]: -inf where a key lies after its query."""
    mask = torch.full((end - begin, end), float("-inf"), dtype=dtype).triu(begin + 1)
    return mask.repeat(group, 1)


class _Varlen:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *lengths], device=q.device).cumsum(0).to(torch.int32)
        longest = max(lengths)
        self._leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        q, k, v = self._leaves
        grouped = q.shape[1] != k.shape[1]
        with torch.enable_grad():
            made = varlen_attn(
                q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped
            )
        assert isinstance(made, Tensor)
        self._made = made
        self.out = made.detach().view(len(q), -1)

    def backward(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_q, by_k, by_v = torch.autograd.grad(
            self._made, self._leaves, slope.view(self._made.shape)
        )
        return by_q, by_k, by_v


_KERNELS: dict[str, Any] = {"segments": _Segments, "blocks": _Blocks, "varlen": _Varlen}
