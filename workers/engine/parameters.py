"""What a run trains, whatever that is: one flat master vector, the views that gradients are taken by, its
state.

The vector is float32 (float64 on a float64 base), so that the optimizer, the gradient norm and a copy of the
state are single operations. On a base of 16 bits the model computes with a 16-bit copy of it, renewed after
every optimizer step: one path for training and sampling, no cast per call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.engine.linear import Slot
from workers.engine.spans import Terms
from workers.engine.state import WEIGHTS, Part, check_facts, check_tensors
from workers.engine.targets import LoraSpec

Shapes = list[tuple[str, tuple[int, ...]]]


class Weights(Protocol):
    """What a base computes with besides its own weights: a run's parameters, or a frozen copy of them."""

    @property
    def terms(self) -> Terms:
        """What is added to each layer; None where the base's own weights are what is trained."""
        ...

    def activate(self, slot: Slot) -> None:
        """Make the base compute with these."""
        ...

    def frozen(self) -> Weights:
        """What computes the same for good, whatever is trained from now on."""
        ...


class Parameters:
    """`master` [P] is the truth, `leaves` are its views (of the 16-bit copy on such a base) in the order of
    `shapes`. `layout` says what each number of `master` is, as plain JSON: parameters of equal layout can
    exchange their weights.
    """

    def __init__(
        self,
        spec: LoraSpec,
        shapes: Shapes,
        layout: dict[str, Any],
        master: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is the base's."""
        # The model's config.json, where the parameters are all of a model.
        self.config: dict[str, Any] = {}
        self.spec, self.shapes, self.layout, self.master = spec, shapes, layout, master
        self._compute = master if dtype == master.dtype else master.to(dtype)
        self.leaves = [view.requires_grad_() for view in self.views(self._compute)]
        self._frozen: Weights | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each tensor's part of a flat [P] tensor, sharing its memory."""
        parts = torch.split(flat.detach(), [math.prod(shape) for _, shape in self.shapes])
        return [part.view(shape) for part, (_, shape) in zip(parts, self.shapes, strict=True)]

    @property
    def terms(self) -> Terms:
        """See Weights.terms."""
        raise NotImplementedError

    def activate(self, slot: Slot) -> None:
        """See Weights.activate."""
        raise NotImplementedError

    def frozen(self) -> Weights:
        """See Weights.frozen: one copy of what is computed with, which all who ask before the next change
        share."""
        if self._frozen is None:
            self._frozen = self._copied(self._compute.detach().clone())
        return self._frozen

    def _copied(self, compute: Tensor) -> Weights:
        """The same with `compute` [P] as its numbers."""
        raise NotImplementedError

    def renew(self) -> None:
        """Bring what is computed with up to date after `master` was changed in place."""
        self._frozen = None
        if self._compute is not self.master:
            self._compute.copy_(self.master)

    def tensors(self) -> dict[str, Tensor]:
        """Master weights by name, sharing memory."""
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


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of the master weights on a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
