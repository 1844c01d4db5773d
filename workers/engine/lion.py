"""Lion (Chen et al., arXiv 2302.06675, algorithm 2): the sign of a momentum, one tensor of state.

theta <- theta - lr * (sign(beta1 * m + (1 - beta1) * g) + wd * theta), then m <- beta2 * m + (1 - beta2) * g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.optimizer import AdamWSettings, Moments


class Lion(Moments):
    """The momentum of one parameter vector."""

    name = "lion"

    def __init__(self, parameters: Tensor) -> None:
        """`parameters` [P] is updated in place by `step`."""
        self.exp_avg = torch.zeros_like(parameters)
        super().__init__(parameters, {"exp_avg": self.exp_avg})

    def step(self, gradient: Tensor, norm: float, settings: AdamWSettings) -> None:
        """See Optimizer.step."""
        if settings.eps != AdamWSettings.eps:
            raise SignalError("unknown_option", "Lion has no eps.", param="eps")
        gradient = settings.clipped(gradient, norm)
        rate, beta1, beta2 = settings.learning_rate, settings.beta1, settings.beta2
        direction = torch.lerp(gradient, self.exp_avg, beta1).sign_()
        self.parameters.mul_(1 - rate * settings.weight_decay).sub_(direction, alpha=rate)
        self.exp_avg.lerp_(gradient, 1 - beta2)
        self.steps += 1
