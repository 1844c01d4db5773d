"""Runs that share a base in one worker: what each computes is what it computes alone, bit for bit.

Sessions in the test's own process, on a real journal, that take turns as in a worker.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from schemas.errors import SignalError
from tests.support.sessions import CONFIG, Together, batch, loop, numbers, step
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.engine import memory, passes
from workers.executing import last_executed
from workers.queue.journal import Journal, connect
from workers.queue.records import Ahead, NewEntry
from workers.session.session import Session
from workers.storage import LocalStorage

A, B, C = (f"run_{number:016x}" for number in range(3))
SHAPES: dict[str, dict[str, Any]] = {
    A: CONFIG,
    B: {**CONFIG, "lora_r": 7, "seed": 9, "lora_target_modules": ["q_proj", "up_proj"]},
    C: {**CONFIG, "lora_r": 2, "lora_dropout": 0.2, "optimizer": "lion", "weight_decay": 0.3},
}
# Many rows, and a budget of a few tokens each: many micro-batches.
LONG = [batch(70, rows=40, tokens=9000), step()]

Proof = tuple[list[dict[str, Any]], dict[str, Any]]
Alone = Callable[[str, Sequence[NewEntry]], Proof]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def make(valkey: Valkey, tmp_path: Path, tiny_model: Path) -> Iterator[Callable[[], Together]]:
    """Makes workers, each with everything of its own but the server."""
    redis = connect(valkey.url)
    made: list[Together] = []

    def worker() -> Together:
        redis.flushall()
        folder = tmp_path / str(len(made))
        folder.mkdir()
        settings = settings_for(folder, valkey.url, snapshot_share=1e-9)
        made.append(Together(Journal(redis, LocalStorage(folder / "store"), settings), tiny_model))
        return made[-1]

    yield worker
    redis.close()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_FEWEST_TOKENS", 4)
    monkeypatch.setitem(memory._MOST_TOKENS, "cpu", 40)
    monkeypatch.setattr("workers.session.rota.LOOK_S", 0.0)


def submit(worker: Together, plans: dict[str, Sequence[NewEntry]]) -> dict[str, Session]:
    found = {}
    for run_id, entries in plans.items():
        worker.journal.open_run(run_id, "user_1")
        worker.journal.append(run_id, list(entries))
        found[run_id] = worker.attach(run_id, 1, config=SHAPES[run_id])
    return found


def proof(session: Session) -> Proof:
    certificate = session.primitives.certificate()
    return numbers(session.journal, session.run_id, session.applied), certificate


@pytest.fixture
def alone(make: Callable[[], Together]) -> Alone:
    """What a run comes to by itself."""

    def compute(run_id: str, entries: Sequence[NewEntry]) -> Proof:
        worker = make()
        session = submit(worker, {run_id: entries})[run_id]
        worker.rota.serve(run_id)
        assert session.applied == len(entries)
        return proof(session)

    return compute


def test_what_is_ahead_is_seen_and_not_taken(make: Callable[[], Together]) -> None:
    journal = make().journal
    for run_id in (A, B, C):
        journal.open_run(run_id, "user_1")
        assert journal.install_epoch(run_id, 1, "w1@h", {"kind": "cpu"})
    journal.append(A, [batch(1, tokens=77), step()])
    journal.append(C, [step()])
    assert journal.hold(C, "paused", {"reason": "user"})
    journal.redis.script_flush()
    everyone = [(A, 1), (B, 1), (C, 1), (A, 2), ("run_ffffffffffffffff", 1)]
    expected = [
        Ahead("entry", "forward_backward", 77),
        *(Ahead(found) for found in ("empty", "held", "fenced", "missing")),
    ]
    for _ in range(2):
        assert journal.peek(everyone) == expected
    journal.close(C, "cancelled")
    assert journal.peek([(C, 1)]) == [Ahead("closed")]
    head = journal.head(A)
    assert head is not None and head.running is None


def test_runs_of_different_shapes_in_turns(make: Callable[[], Together], alone: Alone) -> None:
    plans = {run_id: loop(10 + number) for number, run_id in enumerate(SHAPES)}
    expected = {run_id: alone(run_id, entries) for run_id, entries in plans.items()}
    worker = make()
    found = submit(worker, plans)
    worker.rota.serve(A)
    # Whoever rings, everybody has had turns.
    assert found[B].applied > 0 and found[C].applied > 0
    for run_id in plans:
        worker.rota.serve(run_id)
    assert {run_id: proof(session) for run_id, session in found.items()} == expected


def test_accumulations_that_interleave(make: Callable[[], Together], alone: Alone) -> None:
    plans = {A: [batch(1), batch(2), step()], B: [batch(3), step()]}
    expected = {run_id: alone(run_id, entries) for run_id, entries in plans.items()}
    worker = make()
    found = submit(worker, plans)
    for run_id in (A, B, A, B, A):
        assert found[run_id].work() is not None
    assert {run_id: proof(session) for run_id, session in found.items()} == expected


def test_small_operations_pass_a_long_one_and_change_no_bit_of_it(
    make: Callable[[], Together], alone: Alone
) -> None:
    small = loop(6)
    expected = {A: alone(A, LONG), B: alone(B, small), C: alone(C, small)}
    worker = make()
    found = submit(worker, {A: LONG})
    journal = worker.journal
    for run_id in (B, C):
        found[run_id] = submit(worker, {run_id: []})[run_id]
    order: list[str] = []
    for session in found.values():
        session.worker.events.finished = (  # type: ignore[method-assign]
            lambda taken, _: order.append(taken.run_id)
        )
    slope, calls = passes.Passes._slope, []

    def submitting(self: passes.Passes, *args: Any) -> Any:
        calls.append(self.stream)
        if len(calls) == 1:
            # They come while the long one runs.
            for run_id in (B, C):
                journal.append(run_id, small)
        return slope(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Passes, "_slope", submitting)
        worker.rota.serve(A, until=1)
    assert order.index(A) >= 2 * len(small), "all of the small ones were done before the long one"
    for run_id in found:
        worker.rota.serve(run_id)
    assert {run_id: proof(session) for run_id, session in found.items()} == expected
    assert worker.breaths > len(calls) / 2


def test_a_slice_is_bounded(make: Callable[[], Together], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.session.rota.SLICE_TOKENS", 500)
    worker = make()
    found = submit(worker, {A: LONG, B: [batch(number, tokens=200) for number in range(400)]})
    worker.rota.serve(A, until=1)
    micro_batches = len(next(iter(worker.journal.past(A, 0, 1))).record["plan"]["batches"])
    # Two of them fill a slice, and one turn of its own may come before.
    assert 0 < found[B].applied <= 2 * micro_batches + 20


def test_what_is_long_itself_waits_for_its_turn(make: Callable[[], Together]) -> None:
    worker = make()
    found = submit(worker, {A: LONG, B: LONG, C: [batch(1)]})
    worker.rota.serve(A, until=1)
    assert (found[A].applied, found[C].applied) == (1, 1)
    worker.rota.serve(B)
    assert found[B].applied == 2


def test_a_rebuild_lets_others_pass_and_comes_to_the_same_bits(
    make: Callable[[], Together], alone: Alone
) -> None:
    plans = {A: [*loop(5), *LONG], B: loop(9)}
    expected = {run_id: alone(run_id, entries) for run_id, entries in plans.items()}
    worker = make()
    found = submit(worker, {A: plans[A]})
    worker.rota.serve(A)
    worker.rota.leave(A)
    found = submit(worker, {B: plans[B]})
    found[A] = worker.attach(A, 2, config=SHAPES[A])
    assert found[B].applied > 0
    assert worker.rota.executing.now == ""
    for run_id in found:
        worker.rota.serve(run_id)
    assert {run_id: proof(session) for run_id, session in found.items()} == expected


def test_snapshots_of_each_are_its_own(make: Callable[[], Together], alone: Alone) -> None:
    plans = {run_id: loop(4) for run_id in SHAPES}
    expected = {run_id: alone(run_id, entries) for run_id, entries in plans.items()}
    worker = make()
    found = submit(worker, plans)
    worker.rota.serve(A, until=3)
    assert all(session.snapshot_now() for session in found.values())
    for run_id in SHAPES:
        worker.rota.leave(run_id)
    again = {run_id: worker.attach(run_id, 2, config=SHAPES[run_id]) for run_id in SHAPES}
    for run_id in SHAPES:
        worker.rota.serve(run_id)
    assert {run_id: proof(session) for run_id, session in again.items()} == expected


def nan_rate() -> list[NewEntry]:
    """Weights that are not finite, by steps of the largest rate, and operations on them."""
    huge = NewEntry("optim_step", msgpack.packb({"learning_rate": 1e38}), digest="huge")
    return [batch(1), huge, batch(2), huge, batch(3), step(), batch(4)]


def unknown_ids() -> list[NewEntry]:
    return [batch(1), batch(2, high=5000), step(), batch(3, high=5000), step()]


@pytest.mark.parametrize("bad", [nan_rate(), unknown_ids()], ids=["nan", "ids"])
def test_what_one_run_does_wrong_is_its_own_affair(
    bad: list[NewEntry], make: Callable[[], Together], alone: Alone
) -> None:
    good = loop(5)
    expected = alone(A, good)
    worker = make()
    found = submit(worker, {B: bad, A: good})
    for run_id in (B, A):
        worker.rota.serve(run_id)
    assert found[B].applied == len(bad)
    failed = [past for past in worker.journal.past(B, 0, len(bad)) if past.status == "failed"]
    assert failed
    assert proof(found[A]) == expected


def test_memory_that_runs_out_for_one_changes_no_plan_of_another(
    make: Callable[[], Together], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [batch(number, rows=9) for number in range(3)] + [step()]
    expected = alone(A, good)
    worker = make()
    found = submit(worker, {B: [*good, *good], A: good})
    forward, own = passes.Passes._forward, found[B].trainer.adapter

    def short_of_memory(self: passes.Passes, units: Any, kernel: str) -> Any:
        if self.adapter is own and len(units) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, units, kernel)

    monkeypatch.setattr(passes.Passes, "_forward", short_of_memory)
    for run_id in (B, A):
        worker.rota.serve(run_id)
    assert found[B].trainer.budget.ceiling < found[A].trainer.budget.ceiling
    assert proof(found[A]) == expected


def test_a_run_that_is_another_s_by_now_or_over_is_let_go_of_in_between(
    make: Callable[[], Together],
) -> None:
    worker = make()
    submit(worker, {A: LONG, B: loop(2), C: loop(2)})
    worker.journal.close(C, "cancelled")
    assert worker.journal.install_epoch(B, 5, "w5@h", {"kind": "cpu"})
    worker.rota.serve(A)
    assert list(worker.rota.sessions) == [A]


def test_what_is_wrong_with_another_run_does_not_fail_a_long_operation(
    make: Callable[[], Together], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(A, LONG)
    worker = make()
    found = submit(worker, {A: LONG, B: loop(2)})

    def broken(**_: Any) -> None:
        raise SignalError("operation_failed", "broken")

    monkeypatch.setattr(found[B], "work", broken)
    found[A].worker.pause()
    assert found[A].work() is not None and found[A].work() is not None
    assert proof(found[A]) == expected


def test_the_run_that_executes_is_noted_where_it_can_be_read(
    make: Callable[[], Together], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make()
    found = submit(worker, {A: LONG, B: [batch(1)]})
    path, seen = worker.journal.settings.data_dir / "now", []
    slope = passes.Passes._slope

    def reading(self: passes.Passes, *args: Any) -> Any:
        seen.append((self.adapter is found[A].trainer.adapter, last_executed(path)))
        return slope(self, *args)

    monkeypatch.setattr(passes.Passes, "_slope", reading)
    worker.rota.serve(A, until=1)
    assert {name for own, name in seen if own} == {A}
    assert {name for own, name in seen if not own} == {B}
    assert last_executed(path) == ""


def test_one_message_does_not_keep_the_worker_for_itself(
    make: Callable[[], Together], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session.rota.STAY_S", 0.0)
    worker = make()
    found = submit(worker, {A: loop(5)})
    for applied in range(1, len(loop(5))):
        assert worker.rota.serve(A), "to be rung for again"
        assert found[A].applied == applied
    worker.rota.serve(A)
    assert not worker.rota.serve(A)
    assert found[A].applied == len(loop(5))


def test_what_a_run_held_is_free_when_it_has_left(make: Callable[[], Together]) -> None:
    worker = make()
    submit(worker, {A: loop(2), B: loop(2)})
    worker.rota.serve(B)
    master = weakref.ref(worker.rota.sessions[B].trainer.adapter)
    worker.rota.leave(B)
    gc.collect()
    assert master() is None


def test_a_second_run_is_ready_at_once(make: Callable[[], Together]) -> None:
    worker = make()
    found = submit(worker, {A: loop(3)})
    worker.rota.serve(A)
    began = time.monotonic()
    second = submit(worker, {B: []})[B]
    assert time.monotonic() - began < 0.5
    assert second.trainer.base is found[A].trainer.base
    assert torch.get_num_threads() == 1
