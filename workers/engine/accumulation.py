"""The gradients since the last optimizer step."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.engine.losses import DIVISORS, Reduction
from workers.engine.state import GRADIENT, Part, check_names, is_count, mismatch

_FACTS = ("weight", "reduction", "calls")
_REDUCTIONS = ("sum", *DIVISORS)


class Accumulation:
    """Sum of gradients [P] since the last optimizer step, with the weight (or the count of rows, pairs,
    calls) that it is divided by."""

    def __init__(self, gradient: Tensor, weight: float, reduction: Reduction, calls: int) -> None:
        """`calls` of forward_backward made it."""
        self.gradient, self.weight, self.reduction, self.calls = gradient, weight, reduction, calls

    @property
    def divisor(self) -> float:
        """What the sum is divided by before it is applied."""
        return 1.0 if self.reduction == "sum" else self.weight

    def norm(self) -> float:
        """L2 norm of the gradient as it would be applied; the greatest float where it is not finite."""
        norm = float(torch.linalg.vector_norm(self.gradient)) / self.divisor
        return norm if math.isfinite(norm) else sys.float_info.max

    def joined(self, new: Accumulation) -> Accumulation:
        """Both together; the memory is this one's, which must not be used any more."""
        return Accumulation(
            self.gradient.add_(new.gradient),
            self.weight + new.weight,
            new.reduction,
            self.calls + new.calls,
        )

    def state(self) -> Part:
        """The gradient, and the numbers that go with it."""
        facts = {"weight": self.weight, "reduction": self.reduction, "calls": self.calls}
        return Part({GRADIENT: self.gradient}, facts)

    @classmethod
    def of(cls, part: Part, device: torch.device) -> Accumulation:
        """The reverse of `state`, in memory of its own. Raises SignalError state_mismatch."""
        check_accumulation(part.facts)
        gradient = part.tensors[GRADIENT].to(device, copy=True)
        facts = part.facts
        return cls(gradient, facts["weight"], facts["reduction"], facts["calls"])


def check_accumulation(facts: Any) -> None:
    """Raises SignalError state_mismatch unless these are facts of an accumulation."""
    if not isinstance(facts, Mapping):
        raise mismatch("accumulation is not an object")
    check_names(facts, dict.fromkeys(_FACTS), "the fact accumulation:")
    if type(facts["weight"]) is not float or not math.isfinite(facts["weight"]):
        raise mismatch(f"accumulation.weight is {facts['weight']!r}, not a number")
    if facts["reduction"] not in _REDUCTIONS:
        raise mismatch(f"accumulation.reduction is {facts['reduction']!r}")
    if not is_count(facts["calls"], 1):
        raise mismatch(f"accumulation.calls is {facts['calls']!r}, not a count")
