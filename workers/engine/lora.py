"""One run's adapter: A and B of every layer that it changes, in one flat master buffer.

The buffer is float32 (float64 on a float64 base), so that the optimizer, the gradient norm and a copy of the
state are single operations. On a base of 16 bits the layers compute with a 16-bit copy of it, renewed after
every optimizer step: one path for training and sampling, no cast per call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.engine.linear import LoraLinear, Slot, Term
from workers.engine.state import WEIGHTS, Part, check_facts, check_tensors, dtype_name
from workers.engine.targets import LoraSpec, chosen_layers, target_names

__all__ = ["Adapter", "LoraSpec"]

Shapes = list[tuple[str, tuple[int, ...]]]


class Adapter:
    """`master` [P] is the truth, `leaves` are its views (of the 16-bit copy on such a base): A, B and
    with DoRA the magnitude of each layer, in the order of `shapes`: what gradients are taken by. `layout`
    says what each number of `master` is, as plain JSON: two adapters of equal layout can exchange their
    weights.
    """

    def __init__(self, spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> None:
        """Seeded start: A uniform within 1/sqrt(in), B zero. Raises SignalError for what does not fit."""
        chosen = chosen_layers(spec, layers)
        self.spec, self.targets = spec, target_names(spec, layers)
        self._chosen, self._count = chosen, len(layers)
        self.shapes = _shapes(spec, chosen)
        first = next(iter(chosen.values()))
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.master = _start(spec, self.shapes, wide, chosen).to(first.device)
        self.layout = _layout(spec, self.targets, self.shapes, wide)
        self._compute = self.master if first.dtype == wide else self.master.to(first.dtype)
        self.leaves = [view.requires_grad_() for view in self.views(self._compute)]
        self._terms: list[Term | None] = [None] * self._count
        self._make_terms()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each tensor's part of a flat [P] tensor, sharing its memory."""
        parts = torch.split(flat.detach(), [math.prod(shape) for _, shape in self.shapes])
        return [part.view(shape) for part, (_, shape) in zip(parts, self.shapes, strict=True)]

    def activate(self, slot: Slot) -> None:
        """Make the base's layers use this adapter: one assignment, whatever the size."""
        slot.terms = self._terms

    def renew(self) -> None:
        """Bring what is computed with up to date after `master` was changed in place."""
        if self._compute is not self.master:
            self._compute.copy_(self.master)
        if self.spec.dora:
            self._make_terms()

    def tensors(self) -> dict[str, Tensor]:
        """Master weights by peft's layer names (`<module>.lora_A.weight`), sharing memory."""
        views = self.views(self.master)
        return {name: view for (name, _), view in zip(self.shapes, views, strict=True)}

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

    def _make_terms(self) -> None:
        leaves, wide = iter(self.leaves), iter(self.views(self.master))
        for name, layer in self._chosen.items():
            a, b, scale = next(leaves), next(leaves), self.spec.scale(name)
            low, high = next(wide), next(wide)
            if not self.spec.dora:
                self._terms[layer.index] = Term(a, b, scale)
                continue
            norm = row_lengths(layer, low, high, scale)
            ratio = next(wide) / norm
            self._terms[layer.index] = Term(a, b, scale, next(leaves), norm, ratio)


def row_lengths(layer: LoraLinear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[out] lengths of the rows of W + scale * B A, in the precision of `a`; a few rows at a time."""
    rows = max(1, (1 << 22) // layer.in_features)
    weight = layer.weight.detach()
    parts = [
        torch.linalg.vector_norm(w.to(a.dtype) + scale * (part @ a), dim=1)
        for w, part in zip(torch.split(weight, rows), torch.split(b, rows), strict=True)
    ]
    return torch.cat(parts)


def _shapes(spec: LoraSpec, chosen: Mapping[str, LoraLinear]) -> Shapes:
    """Names and shapes of an adapter's tensors in the order of the model."""
    shapes: Shapes = []
    for name, layer in chosen.items():
        rank = spec.rank(name)
        shapes.append((f"{name}.lora_A.weight", (rank, layer.in_features)))
        shapes.append((f"{name}.lora_B.weight", (layer.out_features, rank)))
        if spec.dora:
            shapes.append((f"{name}.lora_magnitude_vector", (layer.out_features,)))
    return shapes


def _layout(
    spec: LoraSpec, targets: Sequence[str], shapes: Shapes, dtype: torch.dtype
) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "kind": "dora" if spec.dora else "lora",
        "r": spec.r,
        "alpha": float(spec.alpha),
        "targets": list(targets),
        "dtype": dtype_name(dtype),
        "tensors": [[name, list(shape)] for name, shape in shapes],
    }
    # Named only where they say something, so that the states of plain adapters stay what they are.
    if spec.alpha_pattern:
        layout["alpha_pattern"] = {
            key: float(spec.alpha_pattern[key]) for key in spec.alpha_pattern
        }
    if spec.rslora:
        layout["rslora"] = True
    return layout


def _start(
    spec: LoraSpec, shapes: Shapes, dtype: torch.dtype, chosen: Mapping[str, LoraLinear]
) -> Tensor:
    # Drawn on the CPU in float32 whatever the base, so that a seed means one start everywhere;
    # the bound is kaiming_uniform's for a = sqrt(5).
    generator = torch.Generator().manual_seed(spec.seed)
    parts = []
    for name, shape in shapes:
        part = torch.zeros(math.prod(shape), dtype=torch.float32)
        if name.endswith("lora_A.weight"):
            bound = 1.0 / math.sqrt(shape[1])
            part.uniform_(-bound, bound, generator=generator)
        elif name.endswith("lora_magnitude_vector"):
            # Rows begin at their own lengths: a new adapter changes nothing.
            weight = chosen[name.removesuffix(".lora_magnitude_vector")].weight.detach()
            parts.append(torch.linalg.vector_norm(weight.to(dtype), dim=1).cpu())
            continue
        parts.append(part.to(dtype))
    return torch.cat(parts)
