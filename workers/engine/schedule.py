"""Learning-rate schedules as functions of the optimizer steps taken: no state of their own.

The formulas, and the rate 0 of the first step of a warm-up, are those of transformers' `get_scheduler`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Name = Literal["constant", "linear", "cosine", "constant_with_warmup"]


@dataclass(frozen=True)
class Schedule:
    """What the run's learning rate is multiplied by at each step.

    `total_steps` is where linear and cosine arrive at 0; the other two have no end.
    """

    name: Name = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None

    def factor(self, steps: int) -> float:
        """The factor of the step that follows `steps` taken ones, 0 to 1."""
        if self.name == "constant":
            return 1.0
        if steps < self.warmup_steps:
            return steps / max(1, self.warmup_steps)
        if self.name == "constant_with_warmup" or self.total_steps is None:
            return 1.0
        decay = max(1, self.total_steps - self.warmup_steps)
        if self.name == "linear":
            return max(0.0, (self.total_steps - steps) / decay)
        progress = (steps - self.warmup_steps) / decay
        # Beyond its end a cosine would rise again.
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if progress < 1 else 0.0
