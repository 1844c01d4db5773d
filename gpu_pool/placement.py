"""Placement: which queued run goes to which slot. Pure functions; touches nothing.

Runs are served oldest first. A free slot comes before one that would be shared: a worker's runs compute one
at a time. Where none is free, a run joins a worker that has its base, or is loading it, as long as its state
fits beside that of the others. A run that fits nowhere is passed over for now; that cannot starve it, because
any place that it fits goes to it first, and once it has waited long nobody joins the worker whose slot it
will have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from workers.footprint import Footprint


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
    """What a queued run needs; `kind` None is any device, `memory_bytes` 0 any amount. `shares` says by kind
    of device what it would hold beside others; without one it shares with nobody.

    What it would rather have: a device like the one it was on (`near`), and another slot than the
    one that it is to leave (`avoid`, "host/slot"). Neither keeps it waiting. `long`: it has waited so long
    that a slot is kept for it.
    """

    run_id: str
    base_model: str
    kind: str | None = None
    memory_bytes: int = 0
    near: Device | None = None
    avoid: str = ""
    shares: Mapping[str, Footprint] = field(default_factory=dict)
    long: bool = False


@dataclass(frozen=True)
class Opening:
    """A slot that may take a run; `model` is the base model that its worker holds, if any. `tenants` are the
    runs that are there, None for one that shares with nobody, and `most` how many there may be."""

    name: str
    kind: str
    memory_bytes: int
    warmth: Warmth = Warmth.COLD
    model: str | None = None
    device: str = ""
    host: str = ""
    tenants: tuple[Footprint | None, ...] = ()
    most: int = 1


def place(requests: Iterable[Request], slots: Sequence[Opening]) -> tuple[Request, Opening] | None:
    """The oldest request that fits a slot, with the best slot for it; None if none fits."""
    left = list(slots)
    for request in requests:
        fitting = [slot for slot in left if fits(request, slot)]
        if fitting:
            return request, max(fitting, key=lambda slot: _preference(request, slot))
        if request.long and (kept := _to_be_kept(request, left)) is not None:
            left.remove(kept)
    return None


def _to_be_kept(request: Request, slots: Sequence[Opening]) -> Opening | None:
    """The shared slot that the run could have the soonest, if those who are there leave."""
    fitting = [slot for slot in slots if fits(request, replace(slot, tenants=()))]
    return min(fitting, key=lambda slot: len(slot.tenants), default=None)


def fits(request: Request, slot: Opening) -> bool:
    """True when the slot is of the wanted kind, large enough, and free or to be shared."""
    if request.kind not in (None, slot.kind) or request.memory_bytes > slot.memory_bytes:
        return False
    return not slot.tenants or _joins(request.shares.get(slot.kind), slot)


def _joins(share: Footprint | None, slot: Opening) -> bool:
    """The base is there once, and one operation at a time works."""
    everyone = [one for one in (share, *slot.tenants) if one is not None]
    if len(everyone) <= len(slot.tenants) or len(everyone) > slot.most:
        return False
    own = sum(one.own_bytes for one in everyone)
    shared = max(one.base_bytes for one in everyone) + max(one.work_bytes for one in everyone)
    return len({one.base for one in everyone}) == 1 and own + shared <= slot.memory_bytes


def suits(request: Request, slot: Opening) -> bool:
    """True when the slot fits and is also what the run would rather have."""
    return fits(request, slot) and not _avoided(request, slot) and _near(request, slot)


def _avoided(request: Request, slot: Opening) -> bool:
    return request.avoid == f"{slot.host}/{slot.name}"


def _near(request: Request, slot: Opening) -> bool:
    return request.near in (None, Device(slot.kind, slot.device))


def _preference(
    request: Request, slot: Opening
) -> tuple[bool, bool, bool, int, bool, bool, Warmth, int]:
    """Larger is better: not the one to leave; the device it knows; workers live there; free, or the fewest to
    share with; model loaded; evicts no other model; warm; the tightest memory."""
    loaded = slot.model == request.base_model
    evicts = slot.model is not None and not loaded
    return (
        not _avoided(request, slot),
        _near(request, slot),
        slot.warmth > Warmth.RESTING,
        -len(slot.tenants),
        loaded,
        not evicts and slot.warmth >= Warmth.IDLE,
        slot.warmth,
        -slot.memory_bytes,
    )
