"""Operations sent several times and out of order, doorbells lost and doubled, two workers for one run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpu_pool.process import Process
from tests.chaos.conftest import Reference
from tests.chaos.course import course, difference, forward
from tests.chaos.harness import Chaos, another_host, kill
from tests.support.api import Run
from tests.support.inside import until
from tests.support.plan import ended, futures
from workers.queue import keys

WINDOW = 8


def outcomes(chaos: Chaos, ids: list[str]) -> list[dict[str, Any]]:
    """Results and errors in the loop's form."""
    found = [one for at in range(0, len(ids), 50) for one in ended(chaos.api, ids[at : at + 50])]
    return [one["result"] or {"error": one["error"]["code"]} for one in found]


def shuffled_copies(
    operations: list[dict[str, Any]], chance: random.Random
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each operation one to three times under its place in a lane, out of order within a window."""
    sent = [
        (number, {**operation, "lane": "a", "client_seq": number})
        for number, operation in enumerate(operations, 1)
        for _ in range(chance.randint(1, 3))
    ]
    # Sorting by a place that is off by less than the window is a shuffle within it.
    places = {id(pair): at + chance.uniform(0, WINDOW) for at, pair in enumerate(sent)}
    yield from sorted(sent, key=lambda pair: places[id(pair)])


@contextmanager
def tampering(chaos: Chaos, run: Run, chance: random.Random) -> Iterator[None]:
    """Doorbells vanish, double and change places all the time."""
    over, stale = threading.Event(), []

    def tamper(messages: list[bytes]) -> list[bytes]:
        stale.extend(messages)
        kept = [message for message in messages if chance.random() < 0.6]
        kept += [chance.choice(stale) for _ in range(2) if stale]
        return chance.sample(kept, len(kept))

    def work() -> None:
        while not over.wait(0.005):
            chaos.inside.rewrite_queue(run.id, tamper)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def test_sent_one_to_three_times_in_any_order(
    chaos: Chaos, reference: Reference, chance: random.Random
) -> None:
    operations, ids = course(), {}
    with chaos.run() as run, tampering(chaos, run, chance):
        waiting, give_up = deque(shuffled_copies(operations, chance)), time.monotonic() + 60
        while waiting:
            number, body = waiting.popleft()
            sent = {name: value for name, value in body.items() if name != "kind"}
            answer = run.post(f"/{body['kind']}_async", sent)
            if body["kind"] == "load_state" and answer.status_code == 404:
                # What is to be loaded must be there when that is asked for: later, then.
                assert time.monotonic() < give_up
                waiting.append((number, body))
                time.sleep(0.01)
                continue
            assert answer.status_code == 202, answer.text
            # Every copy of an operation is answered with the one future.
            assert ids.setdefault(number, answer.json()["future_id"]) == answer.json()["future_id"]
        found = outcomes(chaos, [ids[number] for number in sorted(ids)])
        assert difference(found, reference.results) is None
        assert chaos.certificate(run)["sha256"] == reference.certificate["sha256"]
        assert len(operations_of(run, len(operations))) == len(operations)


def operations_of(run: Run, upto: int) -> list[int]:
    """The seqs of the run's finished operations, which are without a gap."""
    found: list[int] = []
    while len(found) < upto:
        query = {"after_seq": len(found), "limit": 100}
        rows = run.get("/operations", params=query).json()["data"]
        assert rows, found
        found += [row["seq"] for row in rows]
    assert found == list(range(1, len(found) + 1))
    return found[:upto]


def test_messages_come_back_while_their_operation_takes_five_seconds(
    chaos: Chaos, reference: Reference
) -> None:
    """What a visibility timeout of 2 s does: the same messages again, while the first still runs."""
    operations = course()[:12]
    with chaos.run() as run:
        with chaos.inside.frozen(run.id):
            ids = futures(run, operations)
            messages: list[bytes] = []
            chaos.inside.rewrite_queue(run.id, lambda found: messages.extend(found) or found)
            chaos.points.arm("applied", "wait", when="optim_step")
        chaos.points.await_hit("applied")
        for _ in range(2):
            time.sleep(2)
            chaos.inside.rewrite_queue(run.id, lambda found: [*messages, *found])
            assert not chaos.inside.redis.keys("unacked*")
        time.sleep(1)
        chaos.points.release("applied")
        assert difference(outcomes(chaos, ids), reference.results[: len(ids)]) is None
        assert len(operations_of(run, len(ids))) == len(ids)
        assert run.get().json()["applied_seq"] == len(ids)


def test_our_transport_keeps_no_book_of_deliveries(chaos: Chaos) -> None:
    """kombu itself, with a visibility timeout of 2 s: what one consumer took, no other ever gets."""
    from kombu import Connection, Queue

    name = f"chaos.{os.getpid()}"
    queue = Queue(name, exchange="", routing_key=name)
    options = {"visibility_timeout": 2}
    with (
        Connection(
            chaos.inside.redis_url, transport="workers.queue.transport:Transport",
            transport_options=options,
        ) as first,
        Connection(
            chaos.inside.redis_url, transport="workers.queue.transport:Transport",
            transport_options=options,
        ) as second,
    ):  # fmt: skip
        first.SimpleQueue(queue).put({"operation": 1})
        held = first.SimpleQueue(queue).get(timeout=5)
        deadline = time.monotonic() + 5
        other = second.SimpleQueue(queue)
        while time.monotonic() < deadline:
            with pytest.raises(other.Empty):
                other.get(timeout=1)
            second.default_channel.qos.restore_visible()
        held.ack()
        assert not chaos.inside.redis.keys("unacked*")
        chaos.inside.redis.delete(name)


@contextmanager
def lost_host(chaos: Chaos) -> Iterator[None]:
    """The agent stands still, and the database believes that its host was stopped; the workers live."""
    agent = chaos.inside.service("agent")
    agent.signal(signal.SIGSTOP)
    try:
        with chaos.sql() as sql:
            sql.execute("update hosts set state = 'down'")
        yield
    finally:
        agent.signal(signal.SIGCONT)


@pytest.mark.parametrize("stage", ["committing", pytest.param("received", marks=pytest.mark.long)])
def test_two_live_workers_for_one_run(
    chaos: Chaos, reference: Reference, tmp_path: Path, stage: str
) -> None:
    """The first stands still in the middle of an operation while a second, on another host, takes over."""
    operations = course()
    with chaos.run() as run:
        ids = ended_ids(chaos, run, operations[:10])
        first, epoch = chaos.victim("worker_child", run.id), int(chaos.head(run.id)["epoch"])
        assert first is not None
        chaos.points.arm(stage, "wait", when="optim_step")
        ids += futures(run, operations[10:30])
        assert chaos.points.await_hit(stage).pid == first.pid
        with lost_host(chaos), another_host(chaos, tmp_path):
            until(lambda: int(chaos.head(run.id)["epoch"]) > epoch or None, 60)
            found = outcomes(chaos, ids)
            assert difference(found, reference.results[: len(ids)]) is None
            assert first.alive(), "there were never two"
            chaos.points.release(stage)
            until(lambda: let_go(chaos, first), 30)
            # The same answers after the first has had its say; the run goes on with the second.
            assert difference(outcomes(chaos, ids), found) is None
            more = outcomes(chaos, futures(run, operations[30:50]))
            assert difference(more, reference.results[30:50]) is None
        # The other host was stopped in order, so the run came back to this one.
        chaos.await_status(run, "ready")
        more = outcomes(chaos, futures(run, operations[50:70]))
        assert difference(more, reference.results[50:70]) is None


def let_go(chaos: Chaos, worker: Process) -> bool:
    """Whether a worker's child has ended, or says that it holds no run."""
    if not worker.alive():
        return True
    for key in chaos.inside.redis.keys(keys.worker("*")):
        facts = chaos.inside.redis.hmget(key, "pid", "runs")
        if facts[0] == str(worker.pid).encode():
            return facts[1] in (b"", None)
    return False


def test_a_killed_worker_is_not_blamed_for_what_it_ran(chaos: Chaos, reference: Reference) -> None:
    """Three SIGKILLs from outside in the same operation, and it still ends well."""
    operations = course()[:9]
    with chaos.run() as run:
        ids = ended_ids(chaos, run, operations[:6])
        for blow in range(3):
            chaos.points.arm("applied", "wait", when=operations[6]["kind"])
            if blow == 0:
                ids += futures(run, operations[6:])
            hit = chaos.points.await_hit("applied", 60)
            os.kill(hit.pid, signal.SIGKILL)
        assert difference(outcomes(chaos, ids), reference.results[: len(ids)]) is None


@pytest.mark.long
def test_a_rebuild_may_be_killed_as_often_as_anybody_likes(
    chaos: Chaos, reference: Reference
) -> None:
    """Seven SIGKILLs in a row before the run is ready again: its work is not given up."""
    operations = course()[:40]
    with chaos.run() as run:
        ids = ended_ids(chaos, run, operations[:20])
        worker = chaos.victim("worker_child", run.id)
        assert worker is not None
        chaos.points.arm("restore.loading", "kill")
        kill(worker)
        for blow in range(7):
            chaos.points.await_hit("restore.loading", 60)
            if blow < 6:
                chaos.points.arm("restore.loading", "kill")
        ids += futures(run, operations[20:])
        assert difference(outcomes(chaos, ids), reference.results[:40]) is None


def gone(pid: int) -> bool:
    """Whether the process has ended; one whose parent has not noticed yet has."""
    found = Process.of(pid)
    return found is None or not found.alive()


def ended_ids(chaos: Chaos, run: Run, operations: list[dict[str, Any]]) -> list[str]:
    ids = futures(run, operations)
    ended(chaos.api, ids)
    return ids


@pytest.mark.parametrize("crash", ["segv", pytest.param("abort", marks=pytest.mark.long)])
def test_an_operation_that_crashes_its_worker_three_times_is_given_up(
    chaos: Chaos, crash: str
) -> None:
    sample = {"kind": "sample", "prompts": [[5]], "max_tokens": 2, "stop": []}
    operations = [forward(0), {"kind": "optim_step"}, sample, forward(1), {"kind": "optim_step"}]
    with chaos.run() as run:
        expected = outcomes(chaos, futures(run, [one for one in operations if one != sample]))
    with chaos.run() as run:
        chaos.points.arm("received", crash, when="sample")
        ids = futures(run, operations)
        for blow in range(3):
            hit = chaos.points.await_hit("received", 60)
            until(lambda pid=hit.pid: gone(pid) or None, 20)
            if blow < 2:
                chaos.points.arm("received", crash, when="sample")
        found = outcomes(chaos, ids)
        assert found[2] == {"error": "operation_crashed_worker"}
        rest = [one for at, one in enumerate(found) if at != 2]
        assert [one.get("loss") for one in rest] == [one.get("loss") for one in expected]
        assert run.ok("/forward_backward", {"batch_data": forward(2)["batch_data"]})["loss"]
