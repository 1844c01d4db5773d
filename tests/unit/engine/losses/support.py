"""Random batches for the tests of losses, in the padded form of a textbook and in the form of ours.

A test writes its loss anew on padded [B, T] tensors with a mask, as TRL does, and `check` compares value,
gradient and metrics with the engine's in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workers.engine.losses import DIVISORS, BoundLoss, LossInput, LossOutput, merged, resolve_loss

DTYPE = torch.float64


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for float64's rounding."""
    return torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@dataclass
class Padded:
    """B rows of up to T positions: `mask` [B, T] weights them; `arrays` are [B, T], `values` [B]."""

    logprobs: Tensor
    mask: Tensor
    arrays: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    entropy: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name] if name in self.arrays else self.values[name]

    def sums(self, values: Tensor) -> Tensor:
        """Weighted sums of each row, [B]."""
        return (values * self.mask).sum(-1)

    def means(self, values: Tensor) -> Tensor:
        """Weighted means of each row, [B]."""
        return self.sums(values) / self.mask.sum(-1)

    def rows(self, chosen: Sequence[int]) -> Padded:
        """Some of the rows, in memory of their own but for the log-probabilities."""
        return Padded(
            self.logprobs[list(chosen)],
            self.mask[list(chosen)],
            {name: one[list(chosen)] for name, one in self.arrays.items()},
            {name: one[list(chosen)] for name, one in self.values.items()},
            None if self.entropy is None else self.entropy[list(chosen)],
        )


def make_padded(
    lengths: Sequence[int] = (5, 3, 7, 1, 4, 6),
    seed: int = 0,
    arrays: Sequence[str] = (),
    weights: Sequence[float] = (1.0,),
) -> Padded:
    """Rows of these lengths after a prompt of one position; log-probabilities below 0, others any."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)
    logprobs = -torch.rand(shape, generator=generator, dtype=DTYPE) * 3 - 0.05
    place = torch.arange(shape[1]).expand(shape)
    inside = (place >= 1) & (place <= torch.tensor(lengths).unsqueeze(1))
    drawn = torch.randint(len(weights), shape, generator=generator)
    mask = torch.tensor(weights, dtype=DTYPE)[drawn] * inside
    found = {}
    for name in arrays:
        noise = torch.randn(shape, generator=generator, dtype=DTYPE)
        near = name in ("logprobs", "ref_logprobs")
        found[name] = logprobs + 0.4 * noise if near else noise
    return Padded(logprobs.requires_grad_(), mask, found)


def make_pairs(seed: int = 0, lengths: Sequence[int] = (5, 3, 7, 1, 4, 6)) -> Padded:
    """Preference pairs: rows 0 and 1, 2 and 3, …; the first of each is the chosen one."""
    padded = make_padded(lengths, seed, arrays=("ref_logprobs",))
    padded.values["chosen"] = torch.tensor([1.0, 0.0] * (len(lengths) // 2), dtype=DTYPE)
    return padded


def constants(padded: Padded) -> dict[str, float]:
    """Those of a call that holds these rows."""
    rows = len(padded.mask)
    return {
        "weight": padded.mask.sum().item(),
        "tokens": float((padded.mask != 0).sum()),
        "rows": float(rows),
        "pairs": rows / 2,
        "calls": 1.0,
    }


def as_input(padded: Padded, extra: Mapping[str, float] | None = None) -> LossInput:
    """The counted positions, flat; `extra` constants go before the padded rows' own."""
    counted = padded.mask != 0
    rows, _ = counted.nonzero(as_tuple=True)
    return LossInput(
        logprobs=padded.logprobs[counted],
        weights=padded.mask[counted],
        rows=rows,
        row_count=len(counted),
        arrays={name: one[counted] for name, one in padded.arrays.items()},
        row_values=padded.values,
        constants={**constants(padded), **(extra or {})},
        entropy=None if padded.entropy is None else padded.entropy[counted],
    )


def divisor(loss: BoundLoss, data: LossInput) -> float:
    """What the sum of one call alone is divided by."""
    name = DIVISORS.get(loss.reduction)
    return 1.0 if name is None else data.constants[name]


def compute(
    name: str, padded: Padded, options: Mapping[str, Any], extra: Mapping[str, float] | None = None
) -> tuple[Tensor, LossOutput]:
    """The loss of these rows as one call, divided as its reduction says, and its output."""
    loss, data = resolve_loss(name, options), as_input(padded, extra)
    output = loss(data)
    return output.loss_sum / divisor(loss, data), output


def check(
    name: str,
    padded: Padded,
    expected: Tensor,
    options: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Tensor | float] | None = None,
    extra: Mapping[str, float] | None = None,
) -> None:
    """Value and gradient equal those of `expected`, a scalar of `padded.logprobs`; so do these metrics."""
    found, output = compute(name, padded, options or {}, extra)
    assert close(found, expected), (found, expected)
    leaves = [padded.logprobs] if padded.entropy is None else [padded.logprobs, padded.entropy]
    ours = torch.autograd.grad(found, leaves)
    theirs = torch.autograd.grad(expected, leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert close(one, other)
    numbers = {name: value for name, (value, _) in merged([output.metrics]).items()}
    for metric, value in (metrics or {}).items():
        expected_number = value.item() if isinstance(value, Tensor) else value
        assert abs(numbers[metric] - expected_number) < 1e-10, metric
