"""Which slots an idle run must leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_pool.devices import Slot
from gpu_pool.leasing import LONG, making_room
from gpu_pool.placement import Request


@dataclass
class Idle:
    """A keeper as far as idleness goes."""

    slot: Slot
    idle_s: float


def idle(name: str, seconds: float, kind: str = "cpu", memory: int = 10) -> Any:
    return Idle(Slot(name, kind, "device", memory, 1), seconds)


def chosen(keepers: list[Any], *wishes: Request) -> list[str]:
    return [keeper.slot.name for keeper in making_room(keepers, wishes, 100.0)]


def test_nobody_waits_nobody_leaves() -> None:
    assert chosen([idle("a", 150), idle("b", 399)]) == []


def test_the_longest_idle_leaves_for_each_that_waits() -> None:
    keepers = [idle("a", 110), idle("b", 300), idle("c", 200)]
    assert chosen(keepers, Request("run_1", "m")) == ["b"]
    assert chosen(keepers, Request("run_1", "m"), Request("run_2", "m")) == ["b", "c"]


def test_only_a_slot_that_fits_is_freed() -> None:
    keepers = [idle("a", 300), idle("b", 200, memory=99), idle("c", 150, kind="cuda")]
    assert chosen(keepers, Request("run_1", "m", memory_bytes=50)) == ["b"]
    assert chosen(keepers, Request("run_1", "m", kind="cuda")) == ["c"]
    assert chosen(keepers, Request("run_1", "m", kind="tpu")) == []


def test_whoever_is_idle_for_very_long_leaves_in_any_case() -> None:
    assert chosen([idle("a", LONG * 100.0), idle("b", 150)]) == ["a"]
