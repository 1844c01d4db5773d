"""One run's adapter: A and B, and with DoRA a magnitude, of every layer that it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.engine.linear import LoraLinear, Slot, Term
from workers.engine.parameters import Parameters, Shapes, Weights, master_dtype
from workers.engine.spans import Terms
from workers.engine.state import dtype_name
from workers.engine.targets import LoraSpec, chosen_layers, target_names

__all__ = ["Adapter", "LoraSpec"]


class Adapter(Parameters):
    """The tensors of each layer in the order of the model, by peft's names (`<module>.lora_A.weight`)."""

    def __init__(self, spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> None:
        """Seeded start: A uniform within 1/sqrt(in), B zero. Raises SignalError for what does not fit."""
        chosen = chosen_layers(spec, layers)
        self.targets = target_names(spec, layers)
        shapes, first = _shapes(spec, chosen), next(iter(chosen.values()))
        wide = master_dtype(first.dtype)
        master = _start(spec, shapes, wide, chosen).to(first.device)
        layout = _layout(spec, self.targets, shapes, wide)
        super().__init__(spec, shapes, layout, master, first.dtype)
        self._chosen = chosen
        self._terms: list[Term | None] = [None] * len(layers)
        self._make_terms()

    @property
    def terms(self) -> Terms:
        """See Weights.terms."""
        return self._terms

    def activate(self, slot: Slot) -> None:
        """See Weights.activate: one assignment, whatever the size."""
        slot.terms = self._terms

    def _copied(self, compute: Tensor) -> Weights:
        tensors = iter(self.views(compute))
        terms: list[Term | None] = [None] * len(self._terms)
        for layer in self._chosen.values():
            term = self._terms[layer.index]
            assert term is not None
            a, b = next(tensors), next(tensors)
            magnitude = None if term.magnitude is None else next(tensors)
            # Norm and ratio are made anew by every change, never changed in place.
            terms[layer.index] = Term(a, b, term.scale, magnitude, term.norm, term.ratio)
        return FrozenAdapter(terms)

    def renew(self) -> None:
        """See Parameters.renew."""
        super().renew()
        if self.spec.dora:
            self._make_terms()

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


class FrozenAdapter:
    """What sampling needs of an adapter, as it was at one moment."""

    def __init__(self, terms: Sequence[Term | None]) -> None:
        """`terms` are its own."""
        self.terms: Terms = terms

    def activate(self, slot: Slot) -> None:
        """See Weights.activate."""
        slot.terms = self.terms

    def frozen(self) -> FrozenAdapter:
        """See Weights.frozen."""
        return self


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
