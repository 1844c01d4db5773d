"""Which slots an idle run must leave."""

from __future__ import annotations

from gpu_pool.leasing import LONG, Idle, making_room
from gpu_pool.placement import Footprint, Opening, Request


def idle(
    name: str, seconds: float, kind: str = "cpu", memory: int = 10, *beside: Footprint | None
) -> Idle:
    """A run that is named as its slot."""
    return Idle(name, seconds, Opening(name, kind, memory, tenants=beside, most=8))


def chosen(runs: list[Idle], *wishes: Request) -> list[str]:
    return making_room(runs, wishes, 100.0)


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


def test_one_of_several_leaves_only_for_a_run_that_could_join_the_others() -> None:
    shared = idle("a", 300, "cpu", 10, Footprint("m"))
    alike = Request("run_1", "m", shares={"cpu": Footprint("m")})
    other = Request("run_2", "n", shares={"cpu": Footprint("n")})
    assert chosen([shared], alike) == ["a"]
    assert chosen([shared], other) == []
    assert chosen([shared], Request("run_3", "m")) == []


def test_where_all_are_idle_all_leave_for_one_that_needs_the_slot() -> None:
    pair = [
        Idle(name, 200, Opening("a", "cpu", 10, tenants=(Footprint("m"),))) for name in ("x", "y")
    ]
    alone = Request("run_1", "m")
    assert chosen(pair, alone) == ["x", "y"]
    assert chosen(pair[:1], alone) == []
    assert chosen([*pair, idle("b", 150)], alone) == ["b"]
    assert chosen(pair, Request("run_1", "m", kind="cuda")) == []
