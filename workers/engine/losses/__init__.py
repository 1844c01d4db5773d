"""Losses as pure functions of log-probabilities and arrays, one file each, found by name.

A loss returns a sum. Its reduction says what a gradient is divided by when the optimizer takes a step,
added up over everything accumulated, so that splitting a batch over calls or over micro-batches changes
nothing but rounding. What a request may say is in `schemas.losses`; there `implementation` names the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from schemas.errors import SignalError, raise_all
from schemas.losses import find_loss
from workers.engine.losses.form import (
    DIVISORS,
    BoundLoss,
    Loss,
    LossInput,
    LossOutput,
    Mean,
    Metrics,
    Reduction,
    mean,
    merged,
)

__all__ = [
    "DIVISORS",
    "BoundLoss",
    "Loss",
    "LossInput",
    "LossOutput",
    "Mean",
    "Metrics",
    "Reduction",
    "mean",
    "merged",
    "resolve_loss",
]


def resolve_loss(name: str, options: Mapping[str, Any]) -> BoundLoss:
    """The loss `name` with `options`, the defaults filled in.

    Raises SignalError unknown_loss, unknown_option, validation_error (an option's value), or
    operation_failed when this worker cannot import what the loss's package names.
    """
    spec = find_loss(name)
    raise_all(spec.problems(options))
    return BoundLoss(load(spec.implementation), spec.resolved(options), spec)


@cache
def load(implementation: str) -> Loss:
    """The `Loss` at "module:NAME". Raises SignalError operation_failed."""
    module, _, name = implementation.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SignalError(
            "operation_failed", f"The worker cannot import {implementation}: {error}"
        ) from error
    if not isinstance(found, Loss):
        raise SignalError("operation_failed", f"{implementation} is no Loss.")
    return found
