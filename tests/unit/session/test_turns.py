"""Turns: who waits is served, in proportion, and nobody waits long for a small operation."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.session.turns import LEAST, QUANTUM, Turns


def serve(turns: Turns, sizes: dict[str, int], rounds: int) -> list[str]:
    """Everybody has always something to do, of its own size."""
    for run_id in sizes:
        turns.wants(run_id)
    order = []
    for _ in range(rounds):
        turn = turns.next()
        assert turn is not None
        turns.paid(turn, sizes[turn])
        order.append(turn)
    return order


def test_nobody_waits() -> None:
    turns = Turns()
    assert turns.next() is None
    turns.wants("a")
    turns.rests("a")
    assert turns.next() is None


def test_a_run_alone_is_always_next_however_large_its_operations() -> None:
    assert serve(Turns(), {"a": 10**9}, 50) == ["a"] * 50


def test_large_operations_alternate() -> None:
    order = serve(Turns(), {"a": 3 * QUANTUM, "b": 3 * QUANTUM}, 8)
    assert order == ["a", "b"] * 4


def test_small_ones_come_in_a_quantum_s_worth() -> None:
    order = serve(Turns(1000), {"a": 500, "b": 1000}, 9)
    assert order == ["a", "a", "b"] * 3


def test_a_small_operation_waits_for_one_large_one_at_most() -> None:
    turns = Turns()
    serve(turns, {"large": 100 * QUANTUM}, 5)
    turns.wants("small")
    assert turns.next() == "small"
    turns.paid("small", 10)
    assert turns.next() == "small"


def test_debts_are_waited_off_and_credit_is_not_saved_up() -> None:
    turns = Turns(1000)
    serve(turns, {"a": 10_000}, 1)
    turns.rests("a")
    assert serve(turns, {"b": 1000}, 3) == ["b"] * 3
    turns.wants("a")
    # Three rounds have passed: seven thousand are left.
    assert serve(turns, {"a": 1000, "b": 1000}, 9).count("a") <= 2
    turns.rests("b")
    for _ in range(100):
        turns.paid("a", 1000)
    turns.wants("b")
    assert turns.next() == "b"


def test_only_some_are_asked() -> None:
    turns = Turns()
    for run_id in "abc":
        turns.wants(run_id)
    assert turns.next({"c"}) == "c"
    assert turns.next(set()) is None
    turns.forget("c")
    assert turns.next({"c"}) is None
    assert turns.waits("a") and not turns.waits("c")


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5 * QUANTUM), min_size=1),
    st.integers(50, 400),
)
def test_everybody_gets_about_the_same_tokens(sizes: dict[str, int], rounds: int) -> None:
    counts = Counter(serve(Turns(), sizes, rounds))
    cost = {run_id: max(size, LEAST) for run_id, size in sizes.items()}
    got = [counts[run_id] * cost[run_id] for run_id in sizes]
    assert max(got) - min(got) <= 2 * QUANTUM + 2 * max(cost.values())
