"""The journal on a real server: order, exactly-once names, fencing, cancel, deadlines, close."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SignalError
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.queue import keys
from workers.queue.futures import FutureHub, future_id, parse_future_id
from workers.queue.journal import Behind, Closed, Fenced, Held, Journal, Missing, connect
from workers.queue.records import NewEntry, Outcome, Past
from workers.storage import LocalStorage

RUN = "run_0123456789abcdef"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def journal(valkey: Valkey, tmp_path: Path) -> Iterator[Journal]:
    redis = connect(valkey.url)
    redis.flushall()
    journal = Journal(redis, LocalStorage(tmp_path), settings_for(tmp_path, valkey.url))
    journal.open_run(RUN, "user_1")
    yield journal
    redis.close()


def new(kind: str = "forward_backward", body: bytes = b"x", **fields: Any) -> NewEntry:
    return NewEntry(kind, body, **fields)


def work_off(journal: Journal, epoch: int = 1, status: str = "completed") -> list[tuple[int, str]]:
    """Take and commit everything eligible; (entry, kind) in the order taken."""
    done = []
    while (taken := journal.take(RUN, epoch)) is not None:
        done.append((taken.number, taken.kind))
        journal.commit(RUN, epoch, taken, Outcome(status, b'{"seq":%d}' % taken.seq))
    return done


def test_seq_is_gapless_and_in_order_of_arrival(journal: Journal) -> None:
    appended, admitted, bell = journal.append(RUN, [new(), new("optim_step"), new("sample")])
    assert [(a.entry, a.seq) for a in appended] == [(1, 1), (2, 2), (3, 3)]
    assert admitted == [(1, "forward_backward"), (2, "optim_step"), (3, "sample")] and bell
    assert not journal.append(RUN, [new()])[2], "the bell rings once until the run is worked off"
    assert journal.install_epoch(RUN, 1, "w@h", {"kind": "cpu"})
    assert work_off(journal) == [
        (1, "forward_backward"),
        (2, "optim_step"),
        (3, "sample"),
        (4, "forward_backward"),
    ]
    head = journal.head(RUN)
    assert head is not None and (head.applied, head.seq_count) == (4, 4)
    assert journal.append(RUN, [new()])[2], "an idle run's bell is free again"


def test_a_lane_is_put_in_order_whatever_the_order_of_arrival(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    order = list(range(1, 41))
    random.Random(7).shuffle(order)
    entries = {}
    for client_seq in order + order[:10]:
        sent = new(lane="a", client_seq=client_seq, digest=str(client_seq))
        appended = journal.append(RUN, [sent])[0][0]
        assert entries.setdefault(client_seq, appended.entry) == appended.entry
    assert [number for number, _ in work_off(journal)] == [entries[i] for i in range(1, 41)]


def test_a_client_seq_names_one_request(journal: Journal) -> None:
    journal.append(RUN, [new(lane="a", client_seq=1, digest="one")])
    with pytest.raises(SignalError) as error:
        journal.append(RUN, [new(lane="a", client_seq=1, digest="other")])
    assert error.value.code == "client_seq_conflict"


def test_a_gap_that_is_not_filled_fails_what_is_behind_it(valkey: Valkey, journal: Journal) -> None:
    journal.settings = replace(journal.settings, gap_deadline_s=0.05)
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(
        RUN, [new(lane="a", client_seq=1), new(lane="a", client_seq=3), new(lane="a", client_seq=4)]
    )
    time.sleep(0.1)
    assert journal.sweep() == 2
    late = [e for e in journal.entries(RUN, [2, 3]) if e is not None]
    assert [e.error and e.error["code"] for e in late] == ["sequence_gap", "sequence_gap"]
    with pytest.raises(SignalError, match="sequence_gap"):
        journal.append(RUN, [new(lane="a", client_seq=2)])
    assert journal.append(RUN, [new(lane="a", client_seq=5)])[0][0].seq == 2, "later ones go on"
    assert [number for number, _ in work_off(journal)] == [1, 4]


def test_a_filled_gap_is_forgotten(journal: Journal) -> None:
    journal.settings = replace(journal.settings, gap_deadline_s=0.05)
    journal.append(RUN, [new(lane="a", client_seq=2)])
    journal.append(RUN, [new(lane="a", client_seq=1)])
    time.sleep(0.1)
    assert journal.sweep() == 0


def test_an_idempotency_key_gets_the_first_answer(journal: Journal) -> None:
    first = journal.append(RUN, [new(digest="a"), new(digest="b")], "key")[0]
    again, admitted, _ = journal.append(RUN, [new(digest="a"), new(digest="b")], "key")
    assert [a.entry for a in again] == [a.entry for a in first] and all(a.replayed for a in again)
    assert admitted == []
    for other in ([new(digest="z")], [new(digest="a")]):
        with pytest.raises(SignalError, match="idempotency_conflict"):
            journal.append(RUN, other, "key")
    journal.close(RUN, "completed")
    assert journal.append(RUN, [new(digest="a"), new(digest="b")], "key")[0][0].replayed


def test_concurrent_appends_leave_no_gap(journal: Journal) -> None:
    def send() -> None:
        for _ in range(25):
            journal.append(RUN, [new()])

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = journal.entries(RUN, range(1, 101))
    assert sorted(e.seq for e in found if e and e.seq) == list(range(1, 101))


def test_only_the_newest_epoch_can_take_and_commit(journal: Journal) -> None:
    journal.append(RUN, [new(), new()])
    assert journal.install_epoch(RUN, 1, "old@h", {})
    taken = journal.take(RUN, 1)
    assert taken is not None
    assert journal.install_epoch(RUN, 2, "new@h", {})
    assert not journal.install_epoch(RUN, 1, "old@h", {}), "an epoch never goes back"
    with pytest.raises(Fenced):
        journal.commit(RUN, 1, taken, Outcome("completed", b"zombie"))
    with pytest.raises(Fenced):
        journal.take(RUN, 1)
    again = journal.take(RUN, 2)
    assert again is not None and again.number == taken.number
    journal.commit(RUN, 2, again, Outcome("completed", b"true"))
    entry = journal.entries(RUN, [1])[0]
    assert entry is not None and journal.result(entry) == b"true"


def test_a_commit_whose_reply_was_lost_is_repeated_without_effect(journal: Journal) -> None:
    journal.append(RUN, [new(), new()])
    journal.install_epoch(RUN, 1, "w@h", {})
    taken = journal.take(RUN, 1)
    assert taken is not None
    for answer in (b"first", b"second"):
        journal.commit(RUN, 1, taken, Outcome("completed", answer))
    entry = journal.entries(RUN, [1])[0]
    assert entry is not None and journal.result(entry) == b"first"
    assert len(journal.redis.xrange(keys.COMMITS)) == 2  # placed and one commit


def test_a_worker_ahead_of_the_journal_is_told(journal: Journal) -> None:
    journal.append(RUN, [new(), new(), new()])
    journal.install_epoch(RUN, 1, "w@h", {})
    taken = journal.take(RUN, 1)
    assert taken is not None
    with pytest.raises(Behind):
        journal.commit(RUN, 1, replace(taken, seq=3, number=3), Outcome("completed"))


def test_a_failed_forward_backward_fails_the_step_behind_it(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new(), new("optim_step"), new(), new("optim_step")])
    first = journal.take(RUN, 1)
    assert first is not None
    journal.commit(RUN, 1, first, Outcome("failed", error={"code": "non_finite", "message": ""}))
    step = journal.take(RUN, 1)
    assert step is not None and step.doomed_by == 1
    journal.commit(
        RUN, 1, step, Outcome("failed", error={"code": "predecessor_failed", "message": ""})
    )
    second = journal.take(RUN, 1)
    assert second is not None
    journal.commit(RUN, 1, second, Outcome("completed"))
    step = journal.take(RUN, 1)
    assert step is not None and step.doomed_by is None, (
        "only the step on the broken accumulation fails"
    )


def test_on_error_continue_and_steps_sent_later_are_not_failed(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new(), new("optim_step", on_error="continue")])
    for expected in (None, None):
        taken = journal.take(RUN, 1)
        assert taken is not None and taken.doomed_by is expected
        journal.commit(
            RUN, 1, taken, Outcome("failed", error={"code": "non_finite", "message": ""})
        )
    journal.append(RUN, [new()])
    taken = journal.take(RUN, 1)
    assert taken is not None
    journal.commit(RUN, 1, taken, Outcome("failed", error={"code": "non_finite", "message": ""}))
    journal.append(RUN, [new("optim_step")])
    taken = journal.take(RUN, 1)
    assert taken is not None and taken.doomed_by is None


def test_cancelled_operations_are_passed_over_in_order(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new("sample"), new(), new("optim_step")])
    running = journal.take(RUN, 1)
    assert running is not None
    assert journal.cancel(RUN, 2) == "cancelled"
    assert journal.cancel(RUN, 1) == "stopping" and journal.stops(RUN, 1, [1, 2]) == {1}
    journal.commit(RUN, 1, running, Outcome("cancelled"))
    step = journal.take(RUN, 1)
    assert step is not None and (step.number, step.seq) == (3, 3)
    assert journal.cancel(RUN, 3) == "already_running"
    journal.commit(RUN, 1, step, Outcome("completed"))
    assert journal.cancel(RUN, 3) == "finished"
    kinds = [
        (row[b"entry"], row[b"status"])
        for _, row in journal.redis.xrange(keys.COMMITS)
        if row[b"type"] == b"commit"
    ]
    assert kinds == [(b"1", b"cancelled"), (b"2", b"cancelled"), (b"3", b"completed")]


def test_an_operation_past_its_deadline_fails(journal: Journal) -> None:
    journal.settings = replace(journal.settings, operation_deadline_s=0.05)
    journal.append(RUN, [new()])
    time.sleep(0.1)
    assert journal.sweep() == 1
    entry = journal.entries(RUN, [1])[0]
    assert (
        entry is not None and entry.error is not None and entry.error["code"] == "deadline_exceeded"
    )
    journal.append(RUN, [new()])
    journal.install_epoch(RUN, 1, "w@h", {})
    time.sleep(0.1)
    assert journal.take(RUN, 1) is None, "also without a sweep"


def test_close_ends_every_open_operation(journal: Journal) -> None:
    journal.append(RUN, [new(), new(lane="a", client_seq=2)])
    journal.install_epoch(RUN, 1, "w@h", {})
    taken = journal.take(RUN, 1)
    assert taken is not None
    assert journal.close(RUN, "failed", SignalError("worker_lost"))
    assert not journal.close(RUN, "cancelled")
    errors = [entry.error for entry in journal.entries(RUN, [1, 2]) if entry]
    assert [error and error["code"] for error in errors] == ["worker_lost", "worker_lost"]
    with pytest.raises(Closed):
        journal.commit(RUN, 1, taken, Outcome("completed"))
    with pytest.raises(SignalError, match="run_closed"):
        journal.append(RUN, [new()])
    assert journal.open_runs() == []
    journal.retire(RUN)
    lasting = [key for key in journal.redis.scan_iter("sig:{*") if journal.redis.ttl(key) < 0]
    assert lasting == []


def test_complete_ends_the_run_with_its_commit(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new("complete"), new()])
    taken = journal.take(RUN, 1)
    assert taken is not None
    journal.commit(RUN, 1, taken, Outcome("completed", b"{}", close_status="completed"))
    head, late = journal.head(RUN), journal.entries(RUN, [2])[0]
    assert head is not None and head.closed == "completed"
    assert late is not None and late.error is not None and late.error["code"] == "run_closed"


def test_queue_is_bounded(journal: Journal) -> None:
    journal.settings = replace(journal.settings, max_queued=3)
    journal.append(RUN, [new(), new()])
    with pytest.raises(SignalError, match="queue_full"):
        journal.append(RUN, [new(), new()])
    found = journal.head(RUN)
    assert found is not None and found.entries == 2, "a refused batch leaves no trace"


def test_large_bodies_and_results_live_in_storage(journal: Journal) -> None:
    large = bytes(100_000)
    journal.append(RUN, [new(body=large)])
    journal.install_epoch(RUN, 1, "w@h", {})
    taken = journal.take(RUN, 1)
    assert taken is not None and taken.body == large
    journal.commit(RUN, 1, taken, Outcome("completed", large + b"!"))
    entry = journal.entries(RUN, [1])[0]
    assert entry is not None and journal.results([entry]) == [large + b"!"]
    assert int(journal.redis.memory_usage(keys.prefix(RUN) + "e:1") or 0) < 2000


def test_future_ids_are_signed(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "redis://unused")
    name = future_id(settings, RUN, 12, "00ff00ff")
    assert parse_future_id(settings, name) == (RUN, 12, "00ff00ff")
    for bad in (
        name[:-1] + ("0" if name[-1] != "0" else "1"),
        name.replace("_12_", "_13_"),
        "fut_",
        "",
        name + "\n",
    ):
        with pytest.raises(SignalError, match="not_found"):
            parse_future_id(settings, bad)


def test_hub_wakes_a_waiter_also_over_a_restart_of_the_server(tmp_path: Path) -> None:
    with running_valkey(tmp_path) as server:
        redis = connect(server.url)
        journal = Journal(
            redis, LocalStorage(tmp_path / "store"), settings_for(tmp_path, server.url)
        )
        journal.open_run(RUN, "user_1")
        hub = FutureHub(redis)
        journal.append(RUN, [new(), new()])
        journal.install_epoch(RUN, 1, "w@h", {})
        for number in (1, 2):
            taken = journal.take(RUN, 1)
            assert taken is not None and taken.number == number
            with hub.watch(RUN, [number]) as event, hub.watch(RUN) as any_event:
                event.clear()
                assert not event.wait(0.05)
                journal.commit(RUN, 1, taken, Outcome("completed", json.dumps(number).encode()))
                assert event.wait(2.0) and any_event.is_set()
            if number == 1:
                server.kill()
                server.start()
                time.sleep(0.5)
        hub.close()
        redis.close()


def test_a_listening_worker_hears_of_new_operations_without_a_message(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    assert journal.take(RUN, 1, listening=True) is None
    assert not journal.listen(RUN, 0.01)
    assert journal.append(RUN, [new()])[2], "nobody had the bell"
    assert journal.listen(RUN, 1.0)
    assert work_off_listening(journal) == [1]
    assert not journal.append(RUN, [new()])[2], "the worker still listens: no message is needed"
    assert journal.listen(RUN, 1.0) and work_off_listening(journal) == [2]
    assert journal.take(RUN, 1) is None
    assert journal.append(RUN, [new()])[2], "it has stopped listening"


def work_off_listening(journal: Journal) -> list[int]:
    done = []
    while (taken := journal.take(RUN, 1, listening=True)) is not None:
        done.append(taken.number)
        journal.commit(RUN, 1, taken, Outcome("completed", b"{}"))
    return done


def past_seqs(journal: Journal, after: int, upto: int) -> list[int]:
    return [past.seq for past in journal.past(RUN, after, upto)]


def test_what_is_sealed_is_read_as_before(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    first = journal.append(RUN, [new(body=b"one", digest="d"), new("optim_step")], "c:key")[0]
    journal.append(RUN, [new(lane="a", client_seq=1, digest="l"), new("sample")])
    assert len(work_off(journal)) == 4
    everything = list(journal.past(RUN, 0, 4))
    assert journal.seal(RUN, 1, 3) == 3
    assert list(journal.past(RUN, 0, 4)) == everything
    assert past_seqs(journal, 1, 3) == [2, 3]
    assert [entry.seq for entry in journal.finished_after(RUN, 0, 10)] == [1, 2, 3, 4]
    assert journal.entries(RUN, [1, 2, 3]) == [None, None, None]
    found = journal.sealed(RUN, first[0].entry, first[0].tag)
    assert found is not None and (found.status, journal.result(found)) == (
        "completed",
        b'{"seq":1}',
    )
    assert journal.sealed(RUN, first[0].entry, "00000000") is None
    # Repeats are still known, and the order goes on.
    again = journal.append(RUN, [new(body=b"one", digest="d"), new("optim_step")], "c:key")[0]
    assert [(a.entry, a.tag, a.replayed) for a in again] == [(a.entry, a.tag, True) for a in first]
    assert journal.append(RUN, [new(lane="a", client_seq=1, digest="l")])[0][0].replayed
    assert journal.append(RUN, [new()])[0][0].seq == 5
    assert work_off(journal) == [(5, "forward_backward")]
    with pytest.raises(Fenced):
        journal.seal(RUN, 9, 5)


def test_readers_see_every_entry_while_they_are_sealed(valkey: Valkey, journal: Journal) -> None:
    """Whoever reads at the moment of a trim skips nothing, and takes no body for an empty one."""
    count = 300
    journal.install_epoch(RUN, 1, "w@h", {})
    for first in range(0, count, 50):
        journal.append(RUN, [new(body=b"%d" % (first + i + 1)) for i in range(50)])
    work_off(journal)
    redis = connect(valkey.url)
    sealing = Journal(redis, journal.storage, journal.settings)

    def seal() -> None:
        for upto in range(1, count + 1):
            sealing.seal(RUN, 1, upto)

    results = [b'{"seq":%d}' % seq for seq in range(1, count + 1)]
    assert journal.results(journal.finished_after(RUN, 0, count)) == results
    rounds = 0
    thread = threading.Thread(target=seal)
    thread.start()
    try:
        while thread.is_alive():
            read = [(past.seq, past.body) for past in journal.past(RUN, 0, count)]
            assert read == [(seq, b"%d" % seq) for seq in range(1, count + 1)]
            listed = journal.finished_after(RUN, 0, count)
            assert [entry.seq for entry in listed] == list(range(1, count + 1))
            # Found while some were here, their results looked for when they are sealed.
            assert journal.results(listed) == results
            rounds += 1
            head = journal.head(RUN)
            assert head is not None and head.seq_count == count
    finally:
        thread.join()
        redis.close()
    assert rounds > 1


def test_redis_holds_no_more_of_a_run_than_is_unsealed(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    for _ in range(3):
        journal.append(RUN, [new(body=b"b" * 1000) for _ in range(50)])
        work_off(journal)
        head = journal.head(RUN)
        assert head is not None and head.queued_bytes == 0
        journal.seal(RUN, 1, head.applied)
    head = journal.head(RUN)
    assert head is not None and (head.base, head.unsealed_bytes) == (150, 0)
    left = {key.decode().rpartition(":")[2] for key in journal.redis.scan_iter("sig:{run*")}
    assert left <= {"head", "ring"}
    assert past_seqs(journal, 0, 150) == list(range(1, 151))


def test_a_damaged_segment_is_named(journal: Journal, tmp_path: Path) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new(), new()])
    work_off(journal)
    journal.seal(RUN, 1, 2)
    (file,) = tmp_path.rglob("*.seg")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(SignalError, match=file.name) as caught:
        past_seqs(Journal(journal.redis, journal.storage, journal.settings), 0, 2)
    assert caught.value.code == "snapshot_damaged"


def test_an_operation_is_blamed_three_times_and_given_up(journal: Journal) -> None:
    journal.append(RUN, [new(), new("optim_step"), new("optim_step", on_error="continue")])
    for epoch in range(1, 4):
        assert journal.install_epoch(RUN, epoch, "w@h", {})
        assert journal.take(RUN, epoch) is not None
        assert journal.lost_worker(RUN, epoch, "it was killed", blame=False) == "ok"
    for epoch in range(4, 7):
        journal.install_epoch(RUN, epoch, "w@h", {})
        taken = journal.take(RUN, epoch)
        assert taken is not None and taken.number == 1
        assert journal.lost_worker(RUN, epoch - 1, "late news", blame=True) == "stale"
        assert journal.lost_worker(RUN, epoch, "SIGSEGV", blame=True) == "ok"
    entry = journal.entries(RUN, [1])[0]
    assert entry is not None and entry.error is not None
    assert (entry.status, entry.error["code"]) == ("failed", "operation_crashed_worker")
    # What is sent once the failure is known has nothing to do with it.
    journal.append(RUN, [new("optim_step")])
    journal.install_epoch(RUN, 7, "w@h", {})
    found = []
    while (taken := journal.take(RUN, 7)) is not None:
        found.append((taken.number, taken.doomed_by))
        status = "failed" if taken.doomed_by else "completed"
        journal.commit(RUN, 7, taken, Outcome(status))
    assert found == [(2, 1), (3, None), (4, None)]


def test_a_held_run_takes_nothing_and_refuses_by_name(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new()])
    assert journal.hold(RUN, "paused", {"reason": "user"})
    assert not journal.hold(RUN, "mismatch", {})
    with pytest.raises(Held):
        journal.take(RUN, 1)
    with pytest.raises(SignalError) as caught:
        journal.append(RUN, [new()])
    assert (caught.value.code, caught.value.data) == ("run_paused", {"reason": "user"})
    assert not journal.release(RUN, "rolled_back")
    assert journal.release(RUN, "paused")
    assert journal.take(RUN, 1) is not None


def test_an_operation_wakes_an_idle_run(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.hold(RUN, "paused", {"reason": "idle"})
    journal.append(RUN, [new()])
    head = journal.head(RUN)
    assert head is not None and head.hold == ""
    assert journal.take(RUN, 1) is not None


def test_the_queue_of_a_user_is_bounded_over_all_runs(valkey: Valkey, tmp_path: Path) -> None:
    redis = connect(valkey.url)
    redis.flushall()
    settings = settings_for(tmp_path, valkey.url, user_max_queued=3, max_queued_bytes=100)
    journal, other = Journal(redis, LocalStorage(tmp_path), settings), RUN[:-1] + "0"
    journal.open_run(RUN, "user_1")
    journal.open_run(other, "user_1")
    journal.append(RUN, [new(), new()])
    journal.append(other, [new()])
    with pytest.raises(SignalError) as caught:
        journal.append(other, [new()])
    assert (caught.value.code, caught.value.data) == ("queue_full", {"queued": 3})
    journal.install_epoch(RUN, 1, "w@h", {})
    work_off(journal)
    journal.append(other, [new()])
    with pytest.raises(SignalError) as caught:
        journal.append(other, [new(body=b"x" * 100)])
    assert caught.value.code == "queue_full"
    journal.append(RUN, [new(body=b"x" * 200)])
    redis.close()


def committed(journal: Journal, count: int, epoch: int = 1) -> tuple[list[Any], list[Past]]:
    """Appends and commits so many; the appended, and what a worker remembers of them."""
    appended = journal.append(RUN, [new(digest=str(i)) for i in range(count)])[0]
    work_off(journal, epoch)
    return appended, list(journal.past(RUN, 0, count))


def test_a_flushed_journal_is_put_back_from_memory(journal: Journal) -> None:
    journal.install_epoch(RUN, 3, "w@h", {})
    appended, recent = committed(journal, 4, 3)
    waiting = journal.append(RUN, [new()])[0][0]
    journal.redis.flushall()
    with pytest.raises(Missing):
        journal.take(RUN, 3)
    assert journal.reopen(
        RUN, "user_1", applied=1, base=1, entries=5, epoch=3, worker="w@h", at_seq=4
    )
    held = journal.head(RUN)
    # Nobody reads another seq in between than the one that it comes to.
    assert held is not None
    assert (held.hold, held.hold_info) == ("rolled_back", {"at_seq": 4})
    journal.rewind(
        RUN, 3, state_seq=4, known_from=1, recent=recent[1:], data=[{"step": i} for i in range(3)]
    )
    head = journal.head(RUN)
    assert head is not None
    assert (head.applied, head.seq_count, head.hold, head.hold_info) == (
        4,
        4,
        "rolled_back",
        {"at_seq": 4},
    )
    for was, entry in zip(appended[1:], journal.entries(RUN, [2, 3, 4]), strict=True):
        assert entry is not None and (entry.tag, entry.status) == (was.tag, "completed")
        assert journal.result(entry) == b'{"seq":%d}' % was.seq
    assert journal.entries(RUN, [waiting.entry]) == [None]
    with pytest.raises(SignalError) as caught:
        journal.append(RUN, [new()])
    assert (caught.value.code, caught.value.data) == ("rolled_back", {"at_seq": 4})
    assert journal.release(RUN, "rolled_back")
    assert journal.append(RUN, [new()])[0][0].seq == 5
    assert len(work_off(journal, 3)) == 1


def test_a_journal_that_lost_its_newest_second_is_put_back(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    _, recent = committed(journal, 2)
    keep = {key: journal.redis.dump(key) for key in journal.redis.keys("*")}
    third = journal.append(RUN, [new(digest="third")])[0][0]
    taken = journal.take(RUN, 1)
    assert taken is not None
    journal.commit(RUN, 1, taken, Outcome("completed", b"third"))
    recent = list(journal.past(RUN, 0, 3))
    fourth = journal.append(RUN, [new(digest="fourth")])[0][0]
    held = journal.take(RUN, 1)
    assert held is not None
    journal.redis.flushall()
    for key, value in keep.items():
        journal.redis.restore(key, 0, value)
    stranger = journal.append(RUN, [new(digest="a stranger")])[0][0]
    assert (stranger.entry, stranger.seq) == (third.entry, third.seq)
    with pytest.raises(Behind):
        journal.commit(RUN, 1, held, Outcome("completed", b"fourth"))
    journal.rewind(RUN, 1, state_seq=3, known_from=0, recent=recent, data=[{}] * 3)
    entry = journal.entries(RUN, [3])[0]
    assert entry is not None and entry.tag == third.tag != stranger.tag
    assert journal.result(entry) == b"third"
    head = journal.head(RUN)
    assert head is not None and (head.applied, head.hold) == (3, "rolled_back")
    assert fourth.entry == 4


def test_a_journal_behind_its_snapshot_begins_at_it(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    committed(journal, 2)
    journal.append(RUN, [new()])
    journal.rewind(RUN, 1, state_seq=9, known_from=9)
    head = journal.head(RUN)
    assert head is not None
    assert (head.applied, head.base, head.seq_count, head.hold) == (9, 9, 9, "rolled_back")
    entry = journal.entries(RUN, [3])[0]
    assert entry is not None and entry.error is not None and entry.error["code"] == "journal_lost"
    journal.release(RUN, "rolled_back")
    assert journal.append(RUN, [new()])[0][0].seq == 10


def test_nothing_of_an_erased_run_is_left(journal: Journal) -> None:
    journal.install_epoch(RUN, 1, "w@h", {})
    journal.append(RUN, [new(lane="a", client_seq=1), new(lane="a", client_seq=3)], "c:key")
    journal.close(RUN, "cancelled")
    journal.erase(RUN)
    assert not journal.redis.keys("sig:{*")
    assert journal.open_runs() == []
