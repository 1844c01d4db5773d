"""Placement: the oldest run that fits, on the slot where it starts soonest."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.placement import Device, Footprint, Opening, Request, Warmth, fits, place, suits

GIB = 1024**3


def test_nothing_to_place() -> None:
    assert place([], [Opening("cpu0", "cpu", GIB)]) is None
    assert place([Request("run_1", "m")], []) is None


def test_oldest_first() -> None:
    slots = [Opening("cpu0", "cpu", GIB)]
    chosen = place([Request("run_1", "m"), Request("run_2", "m")], slots)
    assert chosen is not None
    assert chosen[0].run_id == "run_1"


def test_a_run_that_fits_nothing_free_lets_others_pass() -> None:
    slots = [Opening("gpu0", "cuda", 40 * GIB)]
    large, small = Request("run_1", "m", memory_bytes=80 * GIB), Request("run_2", "m")
    assert place([large, small], slots) == (small, slots[0])
    assert place([Request("run_1", "m", kind="cpu"), small], slots) == (small, slots[0])


def test_the_slot_where_a_run_starts_soonest() -> None:
    def chosen(*slots: Opening) -> str:
        placed = place([Request("run_1", "wanted")], slots)
        assert placed is not None
        return placed[1].name

    resting = Opening("resting", "cpu", GIB, Warmth.RESTING)
    cold = Opening("cold", "cpu", GIB)
    starting = Opening("starting", "cpu", GIB, Warmth.STARTING)
    other = Opening("other", "cpu", GIB, Warmth.IDLE, "another")
    idle = Opening("idle", "cpu", GIB, Warmth.IDLE)
    warm = Opening("warm", "cpu", GIB, Warmth.WARM)
    loaded = Opening("loaded", "cpu", GIB, Warmth.IDLE, "wanted")
    order = [loaded, warm, idle, other, starting, cold, resting]
    while order:
        assert chosen(*reversed(order)) == order[0].name
        order.pop(0)


def test_large_slots_are_kept_for_large_runs() -> None:
    slots = [Opening("gpu0", "cuda", 80 * GIB), Opening("gpu1", "cuda", 40 * GIB)]
    placed = place([Request("run_1", "m", memory_bytes=30 * GIB)], slots)
    assert placed is not None
    assert placed[1].name == "gpu1"


def test_a_rebuild_goes_to_the_device_that_it_knows_if_one_is_free() -> None:
    h100 = Opening("gpu0", "cuda", 80 * GIB, device="H100")
    h200 = Opening("gpu1", "cuda", 140 * GIB, Warmth.WARM, "m", device="H200")
    request = Request("run_1", "m", near=Device("cuda", "H100"))
    assert place([request], [h200, h100]) == (request, h100)
    assert place([request], [h200]) == (request, h200)
    assert suits(request, h100)
    assert not suits(request, h200)


def test_a_run_that_is_to_leave_a_slot_comes_back_only_when_no_other_is_free() -> None:
    here = Opening("cpu0", "cpu", GIB, Warmth.WARM, "m", host="h", device="x")
    there = Opening("cpu1", "cpu", GIB, Warmth.RESTING, host="h", device="y")
    request = Request("run_1", "m", near=Device("cpu", "x"), avoid="h/cpu0")
    assert place([request], [here, there]) == (request, there)
    assert place([request], [here]) == (request, here)
    assert not suits(request, here)
    same_name = Opening("cpu0", "cpu", GIB, host="other", device="x")
    assert suits(request, same_name)


_kinds = st.sampled_from(["cpu", "cuda"])
_requests = st.builds(
    Request, st.uuids().map(str), st.sampled_from("ab"), st.none() | _kinds, st.integers(0, 9)
)
_slots = st.builds(
    Opening, st.uuids().map(str), _kinds, st.integers(0, 9), st.sampled_from(Warmth), st.none()
)


@given(st.lists(_requests, max_size=6), st.lists(_slots, max_size=6))
def test_a_placed_run_fits_and_no_older_one_does(
    requests: list[Request], slots: list[Opening]
) -> None:
    placed = place(requests, slots)
    fitting = [request for request in requests if any(fits(request, slot) for slot in slots)]
    if placed is None:
        assert not fitting
    else:
        assert placed[0] is fitting[0]
        assert fits(*placed)


# --- sharing ----------------------------------------------------------------------------------


def sharer(run_id: str, base: str = "m", *, own: int = 1, **more: Any) -> Request:
    return Request(run_id, base, shares={"cpu": Footprint(base, 10, own, 5)}, **more)


def shared(name: str, count: int, base: str = "m", *, most: int = 8) -> Opening:
    tenants = (Footprint(base, 10, 1, 5),) * count
    return Opening(name, "cpu", 30, Warmth.WARM, base, tenants=tenants, most=most)


def test_a_free_slot_comes_before_a_shared_one_and_then_that_of_the_fewest() -> None:
    cold, few, many = Opening("cold", "cpu", 30), shared("few", 1), shared("many", 2)
    order = [cold, few, many]
    while order:
        placed = place([sharer("run_1")], list(reversed(order)))
        assert placed is not None and placed[1] == order.pop(0)


def test_rather_shared_than_where_workers_keep_dying_or_on_another_device() -> None:
    resting = Opening("resting", "cpu", 30, Warmth.RESTING)
    assert place([sharer("run_1")], [resting, shared("a", 1)]) == (sharer("run_1"), shared("a", 1))
    near = sharer("run_1", near=Device("cpu", ""))
    other = Opening("other", "cpu", 30, Warmth.WARM, device="another")
    assert place([near], [other, shared("a", 1)]) == (near, shared("a", 1))


def test_the_base_counts_once_and_so_does_the_room_to_work() -> None:
    # 10 + 5 for all, and 1 for each that is there.
    assert fits(sharer("run_1", own=13), shared("a", 2))
    assert not fits(sharer("run_1", own=14), shared("a", 2))
    assert not fits(sharer("run_1"), shared("a", 2, most=2))
    assert not fits(sharer("run_1"), shared("a", 1, "n"))
    assert not fits(Request("run_1", "m"), shared("a", 1))
    assert not fits(sharer("run_1"), Opening("a", "cpu", 30, tenants=(None,), most=8))
    assert not fits(sharer("run_1"), Opening("a", "cuda", 30, tenants=(Footprint("m"),), most=8))


def test_who_has_waited_long_for_a_slot_is_not_joined_away_from_it() -> None:
    slots = [shared("many", 3), shared("few", 1)]
    young = sharer("run_2")
    assert place([Request("alone", "m"), young], slots) == (young, slots[1])
    # One slot is kept, that of the fewest; the other is not.
    assert place([Request("alone", "m", long=True), young], slots) == (young, slots[0])
    two = [Request("alone", "m", long=True), Request("another", "m", long=True)]
    assert place([*two, young], slots) is None
