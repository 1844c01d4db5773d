"""AdamW with decoupled weight decay, on one flat parameter vector, each step with its own settings.

theta <- theta - lr * wd * theta - lr * m_hat / (sqrt(v_hat) + eps), as torch.optim.AdamW computes it
(Loshchilov and Hutter, arXiv 1711.05101). The kernel is called directly: constructing
torch.optim.AdamW imports torch._dynamo, one second of a worker's start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.state import Part, check_facts, is_count, mismatch

# Below this a vanishing second moment can make the update infinite or 0 / 0.
_SAFE_EPS = 1e-12


@dataclass(frozen=True)
class AdamWSettings:
    """The parameters of a step; `grad_clip_norm` 0 or None means no clipping."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    grad_clip_norm: float | None = None

    def overridden(self, overrides: Mapping[str, float | None]) -> AdamWSettings:
        """These settings with `overrides` in place; None leaves a setting as it is.

        Raises SignalError unknown_option for a name that is no setting.
        """
        for name in overrides:
            if name not in _NAMES:
                raise SignalError("unknown_option", f"AdamW has no parameter {name!r}.", param=name)
        return replace(
            self, **{name: value for name, value in overrides.items() if value is not None}
        )


_NAMES = frozenset(field.name for field in fields(AdamWSettings))


class AdamW:
    """The moments of one parameter vector."""

    def __init__(self, parameters: Tensor) -> None:
        """`parameters` [P] is updated in place by `step`."""
        self.parameters = parameters
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        self.steps = 0

    def step(self, gradient: Tensor, norm: float, settings: AdamWSettings) -> None:
        """Apply `gradient` [P], whose L2 norm is `norm` and finite; clipped as torch clips.

        Raises SignalError non_finite, with nothing changed, when the update is not finite.
        """
        if settings.grad_clip_norm:
            gradient = gradient * min(1.0, settings.grad_clip_norm / (norm + 1e-6))
        state = (self.parameters, self.exp_avg, self.exp_avg_sq)
        kept = [tensor.clone() for tensor in state] if settings.eps < _SAFE_EPS else None
        _apply(state, gradient, self.steps + 1, settings)
        if kept is not None and not math.isfinite(float(self.parameters.sum())):
            for tensor, old in zip(state, kept, strict=True):
                tensor.copy_(old)
            raise SignalError(
                "non_finite",
                "The update is not finite: eps is too small. Nothing was changed.",
                param="eps",
            )
        self.steps += 1

    def state(self) -> Part:
        """Both moments and the number of steps."""
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return Part(tensors, {"name": "adamw", "steps": self.steps})

    def check(self, facts: Any) -> None:
        """Raises SignalError state_mismatch unless these are facts of an AdamW."""
        steps = facts.get("steps") if isinstance(facts, Mapping) else None
        check_facts(facts, {"name": "adamw", "steps": steps}, "optimizer")
        if not is_count(steps):
            raise mismatch(f"optimizer.steps is {steps!r}, not a count")

    def load(self, part: Part) -> None:
        """Take over what `state` gave, with names, shapes and facts already checked."""
        self.exp_avg.copy_(part.tensors["exp_avg"])
        self.exp_avg_sq.copy_(part.tensors["exp_avg_sq"])
        self.steps = part.facts["steps"]

    def reset(self) -> None:
        """As if no step had been taken."""
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.steps = 0


def _apply(
    state: tuple[Tensor, Tensor, Tensor], gradient: Tensor, step: int, settings: AdamWSettings
) -> None:
    parameters, exp_avg, exp_avg_sq = state
    torch._fused_adamw_(
        [parameters],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(step), device=parameters.device)],
        lr=settings.learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
