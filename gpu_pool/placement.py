"""Placement: which queued run goes to which free slot. Pure functions; touches nothing.

Runs are served oldest first. A run that fits none of the free slots is passed over for now; that
cannot starve it, because any slot that it fits goes to it first once that is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Warmth(IntEnum):
    """How ready the worker on a slot is; the higher, the sooner a run can start there."""

    # Workers kept dying there, so the next one is not started at once.
    RESTING = 0
    COLD = 1
    STARTING = 2
    IDLE = 3
    # It has made a dry pass: nothing is left to import.
    WARM = 4


@dataclass(frozen=True)
class Device:
    """What makes two slots compute the same bits: their kind and the model of the device."""

    kind: str
    name: str


@dataclass(frozen=True)
class Request:
    """What a queued run needs; `kind` None is any device, `memory_bytes` 0 any amount.

    What it would rather have: a device like the one it was on (`near`), and another slot than the
    one that it is to leave (`avoid`, "host/slot"). Neither keeps it waiting.
    """

    run_id: str
    base_model: str
    kind: str | None = None
    memory_bytes: int = 0
    near: Device | None = None
    avoid: str = ""


@dataclass(frozen=True)
class FreeSlot:
    """A slot without a lease; `model` is the base model that its worker holds, if any."""

    name: str
    kind: str
    memory_bytes: int
    warmth: Warmth = Warmth.COLD
    model: str | None = None
    device: str = ""
    host: str = ""


def place(
    requests: Iterable[Request], slots: Sequence[FreeSlot]
) -> tuple[Request, FreeSlot] | None:
    """The oldest request that fits a free slot, with the best slot for it; None if none fits."""
    for request in requests:
        fitting = [slot for slot in slots if fits(request, slot)]
        if fitting:
            return request, max(fitting, key=lambda slot: _preference(request, slot))
    return None


def fits(request: Request, slot: FreeSlot) -> bool:
    """True when the slot is of the wanted kind and large enough."""
    return request.kind in (None, slot.kind) and request.memory_bytes <= slot.memory_bytes


def suits(request: Request, slot: FreeSlot) -> bool:
    """True when the slot fits and is also what the run would rather have."""
    return fits(request, slot) and not _avoided(request, slot) and _near(request, slot)


def _avoided(request: Request, slot: FreeSlot) -> bool:
    return request.avoid == f"{slot.host}/{slot.name}"


def _near(request: Request, slot: FreeSlot) -> bool:
    return request.near in (None, Device(slot.kind, slot.device))


def _preference(
    request: Request, slot: FreeSlot
) -> tuple[bool, bool, bool, bool, bool, Warmth, int]:
    """Larger is better: not the one to leave; the device it knows; workers live there; model loaded;
    evicts no other model; warm; the tightest memory."""
    loaded = slot.model == request.base_model
    evicts = slot.model is not None and not loaded
    return (
        not _avoided(request, slot),
        _near(request, slot),
        slot.warmth > Warmth.RESTING,
        loaded,
        not evicts and slot.warmth >= Warmth.IDLE,
        slot.warmth,
        -slot.memory_bytes,
    )
