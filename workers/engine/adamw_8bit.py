"""AdamW whose moments take a byte each: blocks of 256 numbers share a scale (Dettmers et al., arXiv
2110.02861).

bitsandbytes' kernel on tensors of our own, so that they are captured and restored as every other state is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.adamw import SAFE_EPS
from workers.engine.optimizer import AdamWSettings, Moments

_BLOCK = 256


class AdamW8bit(Moments):
    """The moments of one float32 parameter vector as bytes, and the largest number of each block."""

    name = "adamw_8bit"

    def __init__(self, parameters: Tensor) -> None:
        """Takes a trial step on the device. Raises SignalError not_supported with the reason."""
        if parameters.dtype != torch.float32:
            raise _refused(f"it computes in float32, this run in {parameters.dtype}")
        blocks = -(-parameters.numel() // _BLOCK)
        self._maps = _maps(parameters.device)
        tensors = {name: _zeros(parameters, torch.uint8) for name in ("exp_avg_8", "exp_avg_sq_8")}
        for name in ("exp_avg_max", "exp_avg_sq_max"):
            tensors[name] = parameters.new_zeros(blocks, dtype=torch.float32)
        super().__init__(parameters, tensors)
        _try(parameters.device, parameters.dtype)

    def step(self, gradient: Tensor, norm: float, settings: AdamWSettings) -> None:
        """See Optimizer.step."""
        if settings.eps < SAFE_EPS:
            raise SignalError(
                "validation_error",
                f"With moments of 8 bits eps is at least {SAFE_EPS}.",
                param="eps",
            )
        gradient = settings.clipped(gradient, norm)
        _update(self.parameters, gradient, self.tensors, self._maps, self.steps + 1, settings)
        self.steps += 1


def _zeros(parameters: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(parameters.shape, dtype=dtype, device=parameters.device)


def _update(
    parameters: Tensor,
    gradient: Tensor,
    tensors: dict[str, Tensor],
    maps: tuple[Tensor, Tensor],
    step: int,
    settings: AdamWSettings,
) -> None:
    _library().optimizer_update_8bit_blockwise(
        "adam",
        gradient,
        parameters,
        tensors["exp_avg_8"],
        tensors["exp_avg_sq_8"],
        settings.beta1,
        settings.beta2,
        0.0,
        0.0,
        settings.eps,
        step,
        settings.learning_rate,
        *maps,
        tensors["exp_avg_max"],
        tensors["exp_avg_sq_max"],
        settings.weight_decay,
    )


def _maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers that a byte of the first and of the second moment stands for, [256] each."""
    make = _library().create_dynamic_map
    return make(signed=True).to(device), make(signed=False).to(device)


def _try(device: torch.device, dtype: torch.dtype) -> None:
    """Raises SignalError not_supported unless a step can be taken here."""
    trial = torch.ones(_BLOCK, dtype=dtype, device=device)
    tensors = {name: _zeros(trial, torch.uint8) for name in ("exp_avg_8", "exp_avg_sq_8")}
    tensors |= {name: torch.zeros(1, device=device) for name in ("exp_avg_max", "exp_avg_sq_max")}
    try:
        _update(trial, trial.clone(), tensors, _maps(device), 1, AdamWSettings())
    except Exception as error:
        # bitsandbytes raises whatever its backend for the device does.
        raise _refused(f"it does not run on {device} in {dtype}: {error}") from error


@cache
def _library() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise _refused("the package bitsandbytes is not installed on the worker") from error
    return functional


def _refused(reason: str) -> SignalError:
    return SignalError("not_supported", f"adamw_8bit cannot be used: {reason}.", param="optimizer")
