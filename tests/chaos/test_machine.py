"""Random programs of everything that can be done to runs, against an oracle in memory.

Hypothesis makes the programs: create, train, save, load, branch, pause, resume, migrate, cancel, complete,
and kills in between. The oracle predicts each answer; the invariants hold after every rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.chaos.conftest import SEED
from tests.chaos.course import CONFIG, forward, step
from tests.chaos.harness import Chaos, kill, restarted
from tests.chaos.oracle import NUMBERS, Oracle, load
from tests.support.api import Run
from tests.support.inside import until
from tests.support.plan import ended, futures

SLOTS = 2
MOST_RUNS = 5
VICTIMS = ("worker_child", "worker_parent", "agent", "web_worker")


@dataclass
class Pair:
    """A run and what it must be."""

    run: Run
    oracle: Oracle
    paused: bool = False
    names: int = 0


class Machine(RuleBasedStateMachine):
    """The rules; a subclass says which stack and which base."""

    chaos: Chaos
    base: Any
    # Whether every program gets a supervisor that has not seen the deaths of the one before: it pauses
    # longer and longer before it starts what dies often.
    fresh: bool

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        if self.fresh:
            kill(self.chaos.supervisor())
            restarted(self.chaos)

    # --- which runs a rule may take -----------------------------------------------------------

    @property
    def active(self) -> list[Pair]:
        """Those that hold a slot."""
        return [pair for pair in self.pairs if not pair.paused]

    @property
    def room(self) -> bool:
        """Whether another one would get a slot."""
        return len(self.active) < SLOTS and len(self.pairs) < MOST_RUNS

    def draw(self, data: Any, pairs: list[Pair]) -> Pair:
        """One of them."""
        return pairs[data.draw(st.integers(0, len(pairs) - 1), label="run")]

    # --- rules --------------------------------------------------------------------------------

    @precondition(lambda self: self.room)
    @rule(number=st.integers(0, 3))
    def create(self, number: int) -> None:
        config = {**CONFIG, "seed": number}
        self.add(Run(self.chaos.api, self.chaos.api.create(**config)), Oracle(self.base, config))

    def add(self, run: Run, oracle: Oracle) -> None:
        self.pairs.append(Pair(run, oracle))

    @precondition(lambda self: self.active)
    @rule(data=st.data(), first=st.integers(0, 9), count=st.integers(1, 3), last=st.booleans())
    def train(self, data: Any, first: int, count: int, last: bool) -> None:
        operations = []
        for i in range(first, first + count):
            operations += [forward(i)] * (1 + i % 2) + [step(i)]
        self.submit(self.draw(data, self.active), operations if last else operations[:-1])

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def train_without_gradients(self, data: Any) -> None:
        pair = self.draw(data, self.active)
        self.submit(pair, [forward(0), step(0), step(0)])

    def submit(self, pair: Pair, operations: list[dict[str, Any]]) -> None:
        ids = futures(pair.run, operations)
        for operation, found in zip(operations, ended(self.chaos.api, ids), strict=True):
            expected = pair.oracle.apply(operation)
            result = found["result"]
            told = {"error": found["error"]["code"]} if result is None else result
            shown = {name: told[name] for name in (*NUMBERS, "error") if name in told}
            assert shown == {name: expected[name] for name in shown}, (operation, shown, expected)
            assert found["seq"] == pair.oracle.seq

    @precondition(lambda self: self.active)
    @rule(data=st.data(), number=st.integers(0, 9))
    def sample(self, data: Any, number: int) -> None:
        prompt = {"kind": "sample", "prompts": [[number + 5]], "max_tokens": 3, "stop": []}
        pair = self.draw(data, self.active)
        (found,) = ended(self.chaos.api, futures(pair.run, [prompt]))
        pair.oracle.skip()  # it changes nothing
        assert found["status"] == "completed" and found["seq"] == pair.oracle.seq

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def save(self, data: Any) -> None:
        pair = self.draw(data, self.active)
        pair.names += 1
        name = f"saved-{pair.names}"
        self.submit(pair, [{"kind": "save_state", "name": name, "mode": "state"}])

    @precondition(lambda self: any(pair.oracle.saved for pair in self.active))
    @rule(data=st.data())
    def load(self, data: Any) -> None:
        pair = self.draw(data, [pair for pair in self.active if pair.oracle.saved])
        name = data.draw(st.sampled_from(sorted(pair.oracle.saved)), label="name")
        load_it = {"kind": "load_state", "artifact": name}
        (found,) = ended(self.chaos.api, futures(pair.run, [load_it]))
        assert found["status"] == "completed", found
        pair.oracle.trainer.restore(pair.oracle.saved[name])
        # Gradients that were accumulated are neither saved nor kept.
        pair.oracle.trainer.clear_accumulation()
        pair.oracle.skip()
        assert found["seq"] == pair.oracle.seq

    @precondition(lambda self: self.room and self.pairs)
    @rule(data=st.data())
    def branch(self, data: Any) -> None:
        pair = self.draw(data, self.pairs)
        kept = pair.run.get().json()["branchable"]
        if kept is None:
            return
        at_seq = data.draw(st.integers(kept["from"], kept["to"]), label="at_seq")
        answer = pair.run.post("/branch", {"at_seq": at_seq})
        assert answer.status_code == 201, answer.text
        self.add(Run(self.chaos.api, answer.json()["run_id"]), pair.oracle.branch(at_seq))

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def pause(self, data: Any) -> None:
        pair = self.draw(data, self.active)
        answer = pair.run.post("/pause")
        assert answer.status_code in (200, 202), answer.text
        self.chaos.await_status(pair.run, "paused")
        pair.paused = True

    @precondition(lambda self: len(self.active) < SLOTS and len(self.active) < len(self.pairs))
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        pair = self.draw(data, [pair for pair in self.pairs if pair.paused])
        self.resume_it(pair)

    def resume_it(self, pair: Pair) -> None:
        answer = pair.run.post("/resume")
        assert answer.status_code in (200, 202), answer.text
        pair.paused = False
        self.chaos.await_status(pair.run, "ready")

    @precondition(lambda self: len(self.active) == 1)
    @rule()
    def migrate(self) -> None:
        (pair,) = self.active
        self.chaos.await_status(pair.run, "ready")
        before = pair.run.get().json()["device"]["slot"]

        def asked() -> bool:
            """The slot of a run that has just ended or paused becomes free a moment later."""
            answer = pair.run.post("/migrate")
            if answer.status_code == 409 and answer.json()["error"]["code"] == "no_other_device":
                return False
            assert answer.status_code in (200, 202), answer.text
            return True

        # An agent that was killed often is started again after half a minute.
        until(asked, 60)

        def moved() -> bool | None:
            state = pair.run.get().json()
            return (state["status"] == "ready" and state["device"]["slot"] != before) or None

        until(moved, 90)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), which=st.integers(1, 3))
    def cancel(self, data: Any, which: int) -> None:
        """One of the operations behind one that stands still."""
        pair = self.draw(data, self.active)
        self.chaos.await_status(pair.run, "ready")
        operations = [forward(0), forward(1), forward(2), forward(3)]
        points = self.chaos.points
        points.arm("received", "wait", when="forward_backward")
        ids = futures(pair.run, operations)
        points.await_hit("received")
        answer = self.chaos.api.delete(f"/futures/{ids[which]}")
        assert answer.status_code == 200, answer.text
        points.release("received")
        for at, found in enumerate(ended(self.chaos.api, ids)):
            assert found["status"] == ("cancelled" if at == which else "completed")
            if at == which:
                pair.oracle.skip()
            else:
                assert found["result"]["loss"] == pair.oracle.apply(operations[at])["loss"]
        points.disarm("received")

    @precondition(lambda self: self.active)
    @rule(data=st.data(), save=st.booleans())
    def complete(self, data: Any, save: bool) -> None:
        pair = self.draw(data, self.active)
        pair.run.ok("/complete", {"save": save})
        self.pairs.remove(pair)
        assert pair.run.post("/optim_step", {}).status_code == 409

    @precondition(lambda self: self.active)
    @rule(data=st.data(), victim=st.sampled_from(VICTIMS))
    def strike(self, data: Any, victim: str) -> None:
        pair = self.draw(data, self.active)
        process = self.chaos.victim(victim, pair.run.id)
        if process is not None:
            kill(process)

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def at_most_one_owner(self) -> None:
        with self.chaos.sql() as sql:
            rows = sql.execute("select run_id, slot_id from leases where released_at is null")
            held = rows.fetchall()
        # Several runs may share a slot, never several workers a run.
        assert len({run for run, _ in held}) == len(held)

    @invariant()
    def nothing_has_failed(self) -> None:
        for pair in self.pairs:
            state = pair.run.get().json()
            assert state["status"] not in ("completed", "cancelled", "failed"), state
            assert state["applied_seq"] <= pair.oracle.seq

    def teardown(self) -> None:
        try:
            for pair in sorted(self.pairs, key=lambda pair: pair.paused):
                self.finish(pair)
        finally:
            for pair in self.pairs:
                pair.run.post("/cancel")

    def finish(self, pair: Pair) -> None:
        """The state is the predicted one; and the run can be ended."""
        if pair.paused:
            self.resume_it(pair)
        assert self.chaos.certificate(pair.run)["sha256"] == pair.oracle.certificate()
        assert pair.run.post("/cancel").status_code == 200


def run_programs(
    chaos: Chaos, model: Path, programs: int, steps: int, *, fresh: bool = False
) -> None:
    """So many programs of at most so many rules, by the seed."""
    found = load(model)

    @seed(SEED)
    class Bound(Machine):
        pass

    Bound.chaos, Bound.base, Bound.fresh = chaos, found, fresh
    chosen = settings(
        max_examples=programs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        # A shorter program would cost as many starts of workers as the search for it has steps.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Bound, settings=chosen)


@pytest.mark.timeout(300)
def test_a_few_programs(chaos: Chaos, tiny_model: Path) -> None:
    run_programs(chaos, tiny_model, programs=3, steps=10)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_programs(chaos: Chaos, tiny_model: Path) -> None:
    run_programs(chaos, tiny_model, programs=20, steps=30, fresh=True)
