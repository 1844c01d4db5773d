"""A loss bound to the rows of one call: what it needs before the first forward pass, and its value on parts.

This is the seam between losses and batching. Whoever runs the model

1. makes an `Objective` of the call's rows,
2. where `needs_reference`, gives `set_reference` the log-probabilities of the bare base,
3. where `statistic_rows` is not empty, gives `set_statistics` those of the adapted model on these rows,
4. calls `evaluate` on parts of `trained`, cut only between `units`, with differentiable log-probabilities,
   and differentiates each `loss_sum` (the units in any order, the rows of each in theirs),
5. divides the sum of the gradients by `divisor` when a step is taken, and gets `metrics` of the outputs.

Log-probabilities are always [N] in the order of `counted` of the rows in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.counted import counted, example_of
from workers.engine.losses.form import (
    DIVISORS,
    BoundLoss,
    LossInput,
    LossOutput,
    Metrics,
    merged,
)

if TYPE_CHECKING:
    from workers.text.rows import Row

# What a row may give instead of the reference's log-probability of each token.
_ROW_REFERENCE = "ref_logps"


class Objective:
    """One call's loss. Rows are named by their index in `rows`."""

    def __init__(
        self, loss: BoundLoss, rows: Sequence[Row], device: torch.device, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of weights and arrays. Raises SignalError for rows that the loss cannot take."""
        self.loss, self.rows, self.device, self.dtype = loss, rows, device, dtype
        self.trained = [index for index, row in enumerate(rows) if row.trained]
        self._entries = counted(rows)
        self.sizes = self._entries.sizes(len(rows))
        self.num_tokens = sum(self.sizes[index] for index in self.trained)
        kept = np.array([row.trained for row in rows])[self._entries.rows]
        weight = float(self._entries.weights[kept].sum())
        self.constants: dict[str, float] = {
            "weight": weight,
            "tokens": float(self.num_tokens),
            "rows": float(len(self.trained)),
            "pairs": len(self.trained) / 2,
            "calls": 1.0,
        }
        self._reference: list[Tensor] | None = None
        self._check()

    @property
    def units(self) -> list[tuple[int, ...]]:
        """The trained rows, in order; those of one unit must be in one part."""
        if not self.loss.loss.paired:
            return [(index,) for index in self.trained]
        return [tuple(unit) for _, unit in groupby(self.trained, key=self.example)]

    @property
    def divisor(self) -> float:
        """This call's share in what the accumulated gradient is divided by; 1 for a sum."""
        name = DIVISORS.get(self.loss.reduction)
        return 1.0 if name is None else self.constants[name]

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of the bare base are wanted: of every row, untrained ones too."""
        return self.loss.needs_reference and not all(
            "ref_logprobs" in row.arrays or _ROW_REFERENCE in row.values for row in self.rows
        )

    @property
    def statistic_rows(self) -> list[int]:
        """Rows whose log-probabilities a statistic of the batch is made of, before the first part."""
        if self.loss.loss.statistics is None:
            return []
        untrained = [index for index, row in enumerate(self.rows) if not row.trained]
        return untrained or list(self.trained)

    def set_reference(self, logprobs: Tensor) -> None:
        """The bare base's log-probabilities of all rows, without gradient."""
        self._check_finite(range(len(self.rows)), logprobs)
        self._reference = list(torch.split(logprobs.detach().to(self.dtype), self.sizes))

    def set_statistics(self, logprobs: Tensor) -> None:
        """The adapted model's log-probabilities of `statistic_rows`, without gradient."""
        statistics, indices = self.loss.loss.statistics, self.statistic_rows
        self._check_finite(indices, logprobs)
        assert statistics is not None, "only for a loss with statistics"
        with torch.no_grad():
            found = statistics(self.part(indices, logprobs.detach()), self.loss.options)
        self.constants |= found

    def evaluate(
        self, indices: Sequence[int], logprobs: Tensor, entropy: Tensor | None = None
    ) -> LossOutput:
        """The loss of the rows `indices`, whole units in their order."""
        return self.loss(self.part(indices, logprobs, entropy))

    def part(
        self, indices: Sequence[int], logprobs: Tensor, entropy: Tensor | None = None
    ) -> LossInput:
        """What the loss sees of the rows `indices`."""
        rows = [self.rows[index] for index in indices]
        everything = list(indices) == list(range(len(self.rows)))
        entries = self._entries if everything else counted(rows)
        arrays = {name: self._tensor(entries.array(rows, name)) for name in _common_arrays(rows)}
        if self._reference is not None:
            arrays["ref_logprobs"] = torch.cat([self._reference[index] for index in indices])
        return LossInput(
            logprobs=logprobs,
            weights=self._tensor(entries.weights),
            rows=torch.from_numpy(entries.rows).to(self.device),
            row_count=len(rows),
            arrays=arrays,
            row_values=self._row_values(indices),
            constants=self.constants,
            entropy=entropy,
        )

    def metrics(self, parts: Sequence[Metrics]) -> dict[str, tuple[float, float]]:
        """The call's metrics from those of its parts: each mean, and the count that it is over."""
        return merged(parts)

    def example(self, index: int) -> int:
        """The place in the batch of the example that a row was made of."""
        return example_of(self.rows, index)

    def _check_finite(self, indices: Sequence[int], logprobs: Tensor) -> None:
        bad = (~logprobs.isfinite()).nonzero()
        if len(bad):
            owners = np.repeat(np.array(indices), self._sizes(indices))
            example = self.example(int(owners[int(bad[0])]))
            raise SignalError("non_finite", param=f"batch_data.{example}")

    def _sizes(self, indices: Sequence[int]) -> list[int]:
        return [self.sizes[index] for index in indices]

    def _check(self) -> None:
        loss = self.loss
        for index in self.trained:
            row = self.rows[index]
            for name in loss.spec.needs:
                if name not in row.arrays and name not in row.values:
                    raise SignalError(
                        "validation_error",
                        f"{loss.name} needs it.",
                        param=f"batch_data.{self.example(index)}.{name}",
                    )
        if not (self.num_tokens or loss.spec.empty_rows or loss.reduction == "sum"):
            raise SignalError(
                "no_target_tokens",
                "No position of the batch has a weight other than 0.",
                param="batch_data",
            )
        if loss.reduction != "sum" and self.divisor <= 0:
            raise SignalError(
                "validation_error",
                f"{loss.name} is a mean: its weights must have a sum above 0.",
                param="batch_data",
            )
        if loss.loss.paired and not all(map(self._is_pair, self.units)):
            raise SignalError(
                "validation_error",
                f"{loss.name} takes pairs of rows, the chosen one first.",
                param="batch_data",
            )

    def _is_pair(self, unit: Sequence[int]) -> bool:
        return [self.rows[index].values.get("chosen") for index in unit] == [1.0, 0.0]

    def _row_values(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.rows[index] for index in indices]
        names = [name for name in rows[0].values if all(name in row.values for row in rows)]
        numbers = {name: [row.values[name] for row in rows] for name in names}
        numbers["example"] = [float(self.example(index)) for index in indices]
        return {name: self._tensor(np.array(found)) for name, found in numbers.items()}

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device, self.dtype)


def _common_arrays(rows: Sequence[Row]) -> list[str]:
    return [name for name in rows[0].arrays if all(name in row.arrays for row in rows)]
