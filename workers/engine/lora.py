"""LoRA: every linear layer of a base is wrapped once; an adapter is switched on by one assignment.

y = base(x) + (x A^T) B^T * alpha / r, with A [r, in], B [out, r]. An adapter's parameters lie in one flat
master buffer (float32; float64 on a float64 base), so that the optimizer, the gradient norm and a copy
of the state are single operations. On a bfloat16 base the layer computes with a bfloat16 copy of
the master, renewed after every optimizer step: one path for training and sampling, no cast per call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from schemas.errors import SignalError
from workers.engine.state import WEIGHTS, Part, check_facts, check_tensors, dtype_name

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LoraSpec:
    """Shape and start of an adapter; `target_modules` None means every layer of DEFAULT_TARGETS."""

    r: int = 32
    alpha: float = 32.0
    target_modules: tuple[str, ...] | None = None
    seed: int = 0

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / self.r


class Slot:
    """What the wrapped layers of one base look at: the pairs of the active adapter, by layer number."""

    def __init__(self) -> None:
        """No adapter is active at first."""
        self.pairs: Sequence[Pair | None] | None = None
        self.scale = 1.0


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the active adapter's term; without one it is the base layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, slot: Slot, index: int) -> None:
        """Shares `weight` [out, in] and `bias` [out] with the base; `index` is its place in `slot.pairs`."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_t = self.weight.detach().t()
        self.slot, self.index = slot, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = functional.linear(x, self.weight, self.bias)
        pairs = self.slot.pairs
        if pairs is None:
            return y
        pair = pairs[self.index]
        if pair is None:
            return y
        # Flat, so that scaling and adding are part of the last product.
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]),
            functional.linear(x.reshape(-1, x.shape[-1]), pair[0]),
            pair[1].t(),
            alpha=self.slot.scale,
        )
        return flat.view(y.shape)


def wrap_linears(root: nn.Module, skip: Sequence[nn.Module], slot: Slot) -> dict[str, LoraLinear]:
    """Replace every nn.Linear under `root` (but those in `skip`) in place; by module path, in order."""
    found = [
        (name, module) for name, module in root.named_modules() if isinstance(module, nn.Linear)
    ]
    wrapped: dict[str, LoraLinear] = {}
    for name, module in found:
        if any(module is other for other in skip):
            continue
        layer = LoraLinear(
            module.weight.data,
            None if module.bias is None else module.bias.data,
            slot,
            len(wrapped),
        )
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer)
        wrapped[name] = layer
    return wrapped


class Adapter:
    """One run's A and B for every targeted layer of a base.

    `master` [P] is the truth, `leaves` are its (A, B) views (of the bfloat16 copy on a bfloat16 base) in
    the order of `names`: what gradients are taken by. `layout` says what each number of `master` is, as
    plain JSON: two adapters of equal layout can exchange their weights.
    """

    def __init__(self, spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> None:
        """Seeded start: A uniform within 1/sqrt(in), B zero. Raises SignalError for an unknown target."""
        targets = _targets(spec, layers)
        chosen = {
            name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets
        }
        self.spec, self.targets, self.names = spec, targets, tuple(chosen)
        self.shapes = [shape for layer in chosen.values() for shape in _pair_shapes(layer, spec.r)]
        dtype = next(iter(chosen.values())).weight.dtype
        master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        device = next(iter(chosen.values())).weight.device
        self.master = _start(spec, self.shapes, master_dtype).to(device)
        self.layout = _layout(spec, targets, self.names, self.shapes, master_dtype)
        self._compute = self.master if dtype == master_dtype else self.master.to(dtype)
        self.leaves = [view.requires_grad_() for view in self.views(self._compute)]
        self._pairs: list[Pair | None] = [None] * len(layers)
        for number, layer in enumerate(chosen.values()):
            self._pairs[layer.index] = (self.leaves[2 * number], self.leaves[2 * number + 1])

    def views(self, flat: Tensor) -> list[Tensor]:
        """The (A, B) of each layer in a flat [P] tensor, sharing its memory."""
        parts = torch.split(flat.detach(), [rows * columns for rows, columns in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def activate(self, slot: Slot) -> None:
        """Make the base's layers use this adapter: two assignments, whatever the size."""
        slot.pairs, slot.scale = self._pairs, self.spec.scale

    def renew(self) -> None:
        """Bring the computing copy up to date after `master` was changed in place."""
        if self._compute is not self.master:
            self._compute.copy_(self.master)

    def tensors(self) -> dict[str, Tensor]:
        """Master weights by peft's layer names (`<module>.lora_A.weight`), sharing memory."""
        views = iter(self.views(self.master))
        return {f"{name}.lora_{which}.weight": next(views) for name in self.names for which in "AB"}

    def state(self) -> Part:
        """The master weights, and the layout that says what each of them is."""
        return Part({WEIGHTS: self.master}, self.layout)

    def check(self, layout: Any) -> None:
        """Raises SignalError state_mismatch, naming the difference, unless `layout` is this one's."""
        check_facts(layout, self.layout, "layout")

    def load(self, part: Part) -> None:
        """Take over what `state` gave, with names, shapes and facts already checked."""
        self.master.copy_(part.tensors[WEIGHTS])
        self.renew()

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `tensors`, in memory of its own [P], bit for bit.

        Raises SignalError state_mismatch that names the tensor which does not fit.
        """
        own = self.tensors()
        check_tensors(tensors, own)
        return torch.cat([tensors[name].reshape(-1) for name in own])


def _targets(spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> tuple[str, ...]:
    known = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    if spec.target_modules is None:
        return tuple(name for name in DEFAULT_TARGETS if name in known) or tuple(known)
    for name in spec.target_modules:
        if name not in known:
            raise SignalError(
                "validation_error",
                f"The model has no linear layer {name!r}; it has {', '.join(known)}.",
                param="lora_target_modules",
            )
    return tuple(dict.fromkeys(spec.target_modules))


def _pair_shapes(layer: LoraLinear, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    out_features, in_features = layer.weight.shape
    return (r, in_features), (out_features, r)


def _layout(
    spec: LoraSpec,
    targets: Sequence[str],
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    left = iter(shapes)
    return {
        "kind": "lora",
        "r": spec.r,
        "alpha": float(spec.alpha),
        "targets": list(targets),
        "dtype": dtype_name(dtype),
        "tensors": [
            [f"{name}.lora_{which}.weight", list(next(left))] for name in names for which in "AB"
        ],
    }


def _start(spec: LoraSpec, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    # Drawn on the CPU in float32 whatever the base, so that a seed means one start everywhere;
    # the bound is kaiming_uniform's for a = sqrt(5).
    generator = torch.Generator().manual_seed(spec.seed)
    parts = []
    for number, (rows, columns) in enumerate(shapes):
        part = torch.zeros(rows * columns)
        if number % 2 == 0:
            bound = 1.0 / math.sqrt(columns)
            part.uniform_(-bound, bound, generator=generator)
        parts.append(part)
    return torch.cat(parts).to(dtype)
