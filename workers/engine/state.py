"""A run's whole state, outside of the run: named tensors on the CPU and facts that are plain JSON.

Each part of a trainer (the adapter, the optimizer, the accumulation) names its own tensors and facts as a
`Part` and takes them back, so that another kind of optimizer adds names and changes nothing here. The
checks are strict, and all of them are made before a part takes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemas.errors import SignalError

# Names that a certificate tells apart; every other tensor belongs to the optimizer.
WEIGHTS = "master"
GRADIENT = "gradient"


class Part(NamedTuple):
    """What one part of a trainer contributes; its tensors share the part's memory."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class TrainerState:
    """Everything that later operations depend on, but the base and the run's config.

    `facts` are `layout` (what the weights mean), `optimizer` (its name and steps) and `accumulation`
    (weight, reduction, calls, or None). Nothing changes a state once it is made.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.facts["optimizer"]["steps"])


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones on the CPU. From a GPU they go to pinned memory, all at once, and are awaited."""
    made = {}
    for name, tensor in tensors.items():
        pinned = tensor.is_cuda
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        made[name] = copy.copy_(tensor.detach(), non_blocking=pinned)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return made


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy; row-major, little-endian."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def mismatch(message: str) -> SignalError:
    """The refusal of a state that is not this run's."""
    return SignalError("state_mismatch", f"The saved state does not fit the run: {message}.")


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], kind: str) -> None:
    """Raises state_mismatch that names the first of `expected` that lacks, or what is not expected."""
    for name in expected:
        if name not in found:
            raise mismatch(f"{kind} {name} is missing")
    for name in found:
        if name not in expected:
            raise mismatch(f"{kind} {name} is unknown")


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises state_mismatch unless names, shapes and dtypes are equal."""
    check_names(found, expected, "the tensor")
    for name, tensor in expected.items():
        _check_equal(f"the shape of {name}", list(found[name].shape), list(tensor.shape))
        _check_equal(
            f"the number format of {name}", dtype_name(found[name].dtype), dtype_name(tensor.dtype)
        )


def check_facts(found: Any, expected: Mapping[str, Any], place: str) -> None:
    """Raises state_mismatch unless `found` is equal to `expected`; `place` is what they are called."""
    if not isinstance(found, Mapping):
        raise mismatch(f"{place} is not an object")
    check_names(found, expected, f"the fact {place}:")
    for name, value in expected.items():
        _check_equal(f"{place}.{name}", found[name], value)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a fact is a whole number of at least `least`."""
    return type(value) is int and value >= least


def _check_equal(what: str, found: Any, expected: Any) -> None:
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        # A list of hundreds of names says nothing: the first that differs does.
        pairs = zip(found, expected, strict=True)
        found, expected = next((pair for pair in pairs if pair[0] != pair[1]), (found, expected))
    if found != expected:
        raise mismatch(f"{what} is {found!r}, in this run {expected!r}"[:500])
