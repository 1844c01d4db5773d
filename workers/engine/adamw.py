"""AdamW with decoupled weight decay, on one flat parameter vector, each step with its own settings.

theta <- theta - lr * wd * theta - lr * m_hat / (sqrt(v_hat) + eps), as torch.optim.AdamW computes it
(Loshchilov and Hutter, arXiv 1711.05101). The kernel is called directly: constructing
torch.optim.AdamW imports torch._dynamo, one second of a worker's start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.optimizer import AdamWSettings, Moments

__all__ = ["AdamW", "AdamWSettings"]

# Below this a vanishing second moment can make the update infinite or 0 / 0.
SAFE_EPS = 1e-12


class AdamW(Moments):
    """The moments of one parameter vector."""

    name = "adamw"

    def __init__(self, parameters: Tensor) -> None:
        """`parameters` [P] is updated in place by `step`."""
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        super().__init__(parameters, {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq})

    def step(self, gradient: Tensor, norm: float, settings: AdamWSettings) -> None:
        """See Optimizer.step."""
        state = (self.parameters, self.exp_avg, self.exp_avg_sq)
        kept = [tensor.clone() for tensor in state] if settings.eps < SAFE_EPS else None
        _apply(state, settings.clipped(gradient, norm), self.steps + 1, settings)
        if kept is not None and not math.isfinite(float(self.parameters.sum())):
            for tensor, old in zip(state, kept, strict=True):
                tensor.copy_(old)
            raise SignalError(
                "non_finite",
                "The update is not finite: eps is too small.",
                param="eps",
            )
        self.steps += 1


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
