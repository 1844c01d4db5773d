"""Optimizers of one flat parameter vector: what they have in common, and the table of them.

An optimizer names its own tensors and facts as a `Part`, so that snapshots, certificates and replay know
each of them without knowing any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from torch import Tensor

from schemas.errors import SignalError
from workers.engine.state import Part, check_facts, is_count, mismatch


@dataclass(frozen=True)
class AdamWSettings:
    """The parameters of a step, of every optimizer; `grad_clip_norm` 0 or None means no clipping."""

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
                raise SignalError(
                    "unknown_option", f"An optimizer has no parameter {name!r}.", param=name
                )
        return replace(
            self, **{name: value for name, value in overrides.items() if value is not None}
        )

    def clipped(self, gradient: Tensor, norm: float) -> Tensor:
        """`gradient`, whose L2 norm is `norm`, shortened to `grad_clip_norm` as torch does it."""
        if not self.grad_clip_norm:
            return gradient
        return gradient * min(1.0, self.grad_clip_norm / (norm + 1e-6))


_NAMES = frozenset(field.name for field in fields(AdamWSettings))


class Optimizer(Protocol):
    """The state of an optimizer, and how it changes the parameters that it was made for."""

    steps: int

    def step(self, gradient: Tensor, norm: float, settings: AdamWSettings) -> None:
        """Apply `gradient` [P], whose L2 norm is `norm` and finite.

        Raises SignalError, with nothing changed, for settings that it cannot honour or an update that is
        not finite.
        """

    def state(self) -> Part:
        """Its tensors, and its name and number of steps."""
        ...

    def check(self, facts: Any) -> None:
        """Raises SignalError state_mismatch unless these are facts of such an optimizer."""

    def load(self, part: Part) -> None:
        """Take over what `state` gave, with names, shapes and facts already checked."""

    def reset(self) -> None:
        """As if no step had been taken."""


class Moments:
    """The bookkeeping that optimizers share: named tensors that begin at 0, and a count of steps."""

    name: str

    def __init__(self, parameters: Tensor, tensors: dict[str, Tensor]) -> None:
        """`parameters` [P] is updated in place by `step`."""
        self.parameters, self.tensors, self.steps = parameters, tensors, 0

    def state(self) -> Part:
        """See Optimizer.state."""
        return Part(dict(self.tensors), {"name": self.name, "steps": self.steps})

    def check(self, facts: Any) -> None:
        """See Optimizer.check."""
        steps = facts.get("steps") if isinstance(facts, Mapping) else None
        check_facts(facts, {"name": self.name, "steps": steps}, "optimizer")
        if not is_count(steps):
            raise mismatch(f"optimizer.steps is {steps!r}, not a count")

    def load(self, part: Part) -> None:
        """See Optimizer.load."""
        for name, tensor in self.tensors.items():
            tensor.copy_(part.tensors[name])
        self.steps = part.facts["steps"]

    def reset(self) -> None:
        """See Optimizer.reset."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.steps = 0


def make_optimizer(name: str, parameters: Tensor) -> Optimizer:
    """The optimizer `name` for `parameters` [P]. Raises SignalError not_supported where it does not run."""
    return _makers()[name](parameters)


def default_settings(name: str) -> AdamWSettings:
    """What a step is taken with where nothing is said: Lion's authors decay its momentum faster."""
    return AdamWSettings(beta2=0.99) if name == "lion" else AdamWSettings()


def _makers() -> Mapping[str, Callable[[Tensor], Optimizer]]:
    from workers.engine.adamw import AdamW
    from workers.engine.adamw_8bit import AdamW8bit
    from workers.engine.lion import Lion

    return {"adamw": AdamW, "adamw_8bit": AdamW8bit, "lion": Lion}
