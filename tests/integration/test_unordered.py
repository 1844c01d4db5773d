"""Operations without a place in the order: beside everything, once, and never lost with their worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SignalError
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.queue.journal import Closed, Fenced, Held, Journal, connect
from workers.queue.records import Appended, Entry, NewEntry, Outcome, Taken
from workers.storage import LocalStorage

RUN = "run_0123456789abcdef"
DONE = Outcome("completed", b'{"ok":1}')


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def journal(valkey: Valkey, tmp_path: Path) -> Iterator[Journal]:
    redis = connect(valkey.url)
    redis.flushall()
    made = Journal(redis, LocalStorage(tmp_path / "store"), settings_for(tmp_path, valkey.url))
    made.open_run(RUN, "user_1")
    made.install_epoch(RUN, 1, "w@h", {})
    yield made
    redis.close()


def free(body: bytes = b"x", **fields: Any) -> NewEntry:
    return NewEntry("sample", body, ordered=False, **fields)


def send(journal: Journal, *entries: NewEntry) -> list[Appended]:
    return journal.append(RUN, entries)[0]


def end(journal: Journal, taken: Taken, outcome: Outcome = DONE, epoch: int = 1) -> None:
    journal.commit_free(RUN, epoch, taken, outcome, journal.store_result(RUN, outcome))


def entry(journal: Journal, number: int) -> Entry:
    (found,) = journal.entries(RUN, [number])
    assert found is not None
    return found


def head(journal: Journal) -> Any:
    found = journal.head(RUN)
    assert found is not None
    return found


def test_they_have_no_seq_and_stand_in_nobodys_way(journal: Journal) -> None:
    step = NewEntry("optim_step", b"")
    sent = send(journal, step, free(b"a"), step, free(b"b"))
    assert [(one.entry, one.seq, one.status) for one in sent] == [
        (1, 1, "pending"), (2, None, "pending"), (3, 2, "pending"), (4, None, "pending"),
    ]  # fmt: skip
    waiting = [entry(journal, number) for number in (2, 4)]
    assert journal.positions(waiting) == {(RUN, 2): 0, (RUN, 4): 1}
    # The second ends before the first, and before the operations that were sent before it.
    first, second = journal.take_free(RUN, 1, 10)
    assert [(one.number, one.seq, one.body) for one in (first, second)] == [
        (2, 0, b"a"),
        (4, 0, b"b"),
    ]
    assert (head(journal).free, head(journal).flying, head(journal).busy) == (0, 2, True)
    end(journal, second)
    assert (entry(journal, 4).status, entry(journal, 2).status) == ("completed", "running")
    assert journal.result(entry(journal, 4)) == b'{"ok":1}'
    for number in (1, 3):
        taken = journal.take(RUN, 1)
        assert taken is not None and taken.number == number
        journal.commit(RUN, 1, taken, Outcome("completed"))
    assert journal.take(RUN, 1) is None
    assert head(journal).waits
    end(journal, first)
    assert not head(journal).waits and not head(journal).busy
    assert (head(journal).applied, head(journal).queued_bytes) == (2, 0)
    assert [one.seq for one in journal.finished_after(RUN, 0, 10)] == [1, 2]


def test_the_bell_stays_taken_while_one_waits(journal: Journal) -> None:
    assert journal.append(RUN, [free()])[2], "the first rings"
    assert journal.take(RUN, 1) is None
    assert not journal.append(RUN, [free()])[2], "the worker has yet to look"
    assert len(journal.take_free(RUN, 1, 1)) == 1
    assert len(journal.take_free(RUN, 1, 5)) == 1
    assert journal.take(RUN, 1) is None
    assert journal.append(RUN, [free()])[2]


def test_a_commit_is_made_once(journal: Journal) -> None:
    send(journal, free())
    (taken,) = journal.take_free(RUN, 1, 1)
    end(journal, taken)
    end(journal, taken, Outcome("failed", error={"code": "x"}))
    assert entry(journal, 1).status == "completed"
    end(journal, replace(taken, number=9))


def test_what_a_lost_worker_executed_is_executed_by_the_next(journal: Journal) -> None:
    send(journal, free(b"a"), free(b"b"))
    old, done = journal.take_free(RUN, 1, 5)
    end(journal, done)
    journal.lost_worker(RUN, 1, "killed", blame=False)
    assert journal.install_epoch(RUN, 2, "w2@h", {})
    for call in (lambda: end(journal, old), lambda: journal.take_free(RUN, 1, 1)):
        with pytest.raises(Fenced):
            call()
    (again,) = journal.take_free(RUN, 2, 5)
    assert (again.number, again.body, again.started_at) == (1, b"a", old.started_at)
    end(journal, again, epoch=2)
    assert entry(journal, 1).status == "completed"


def test_one_that_is_blamed_three_times_is_given_up(journal: Journal) -> None:
    send(journal, free())
    for epoch in (1, 2, 3):
        assert len(journal.take_free(RUN, epoch, 1)) == 1
        journal.lost_worker(RUN, epoch, "SIGSEGV", blame=True)
        assert journal.install_epoch(RUN, epoch + 1, "w@h", {})
    failed = entry(journal, 1)
    assert (failed.status, (failed.error or {})["code"]) == ("failed", "operation_crashed_worker")
    assert journal.take_free(RUN, 4, 1) == []


def test_an_operation_in_order_is_blamed_before_those_beside_it(journal: Journal) -> None:
    send(journal, free(), NewEntry("optim_step", b""))
    for epoch in (1, 2, 3):
        journal.take_free(RUN, epoch, 1)
        journal.take(RUN, epoch)
        journal.lost_worker(RUN, epoch, "SIGSEGV", blame=True)
        assert journal.install_epoch(RUN, epoch + 1, "w@h", {})
    assert (entry(journal, 2).status, entry(journal, 1).status) == ("failed", "pending")


def test_a_client_seq_tells_repeats_apart_in_any_order(journal: Journal) -> None:
    first = send(journal, free(lane="s", client_seq=7, digest="a" * 64))[0]
    other = send(journal, free(lane="s", client_seq=3, digest="b" * 64))[0]
    again = send(journal, free(lane="s", client_seq=7, digest="a" * 64))[0]
    assert (again.entry, again.replayed, again.tag) == (first.entry, True, first.tag)
    assert other.entry != first.entry and not other.replayed
    with pytest.raises(SignalError) as caught:
        send(journal, free(lane="s", client_seq=3, digest="c" * 64))
    assert caught.value.code == "client_seq_conflict"
    assert [one.number for one in journal.take_free(RUN, 1, 9)] == [first.entry, other.entry]
    # A lane of ordered operations of the same name is another.
    assert send(journal, NewEntry("optim_step", b"", lane="s", client_seq=1))[0].seq == 1


def test_they_are_cancelled_and_stopped(journal: Journal) -> None:
    send(journal, free(), free())
    assert journal.cancel(RUN, 1) == "cancelled"
    (taken,) = journal.take_free(RUN, 1, 5)
    assert taken.number == 2 and journal.stops(RUN, 1, [2]) == set()
    assert journal.cancel(RUN, 2) == "stopping"
    assert journal.stops(RUN, 1, [2, 5]) == {2} and journal.stops(RUN, 9, [2]) == {2}
    end(journal, taken, Outcome("cancelled"))
    assert entry(journal, 2).status == "cancelled"


def test_a_paused_run_takes_none_and_goes_on_with_them(journal: Journal) -> None:
    send(journal, free())
    journal.hold(RUN, "paused", {"reason": "user"})
    with pytest.raises(Held):
        journal.take_free(RUN, 1, 1)
    journal.release(RUN, "paused")
    assert len(journal.take_free(RUN, 1, 1)) == 1


def test_the_end_of_the_run_ends_them(journal: Journal) -> None:
    send(journal, free(), free())
    (taken,) = journal.take_free(RUN, 1, 1)
    journal.close(RUN, "cancelled")
    assert {entry(journal, number).status for number in (1, 2)} == {"cancelled"}
    for call in (lambda: end(journal, taken), lambda: journal.take_free(RUN, 1, 1)):
        with pytest.raises(Closed):
            call()


def test_deadlines_hold_for_them(valkey: Valkey, journal: Journal) -> None:
    journal.settings = replace(journal.settings, operation_deadline_s=0.01)
    send(journal, free(), free())
    time.sleep(0.02)
    assert journal.take_free(RUN, 1, 1) == []
    assert journal.sweep() == 0
    for number in (1, 2):
        assert (entry(journal, number).error or {})["code"] == "deadline_exceeded"


def test_large_ones_lie_in_storage_and_go_when_they_expire(
    journal: Journal, tmp_path: Path
) -> None:
    size = journal.settings.inline_bytes + 1
    journal.redis.hset(f"sig:{{{RUN}}}:head", "ttl", "1")
    send(journal, free(b"b" * size))
    (taken,) = journal.take_free(RUN, 1, 1)
    assert taken.body == b"b" * size
    end(journal, taken, Outcome("completed", b"r" * size))
    assert journal.result(entry(journal, 1)) == b"r" * size

    def files() -> list[Path]:
        return list((tmp_path / "store").rglob("bodies/*"))

    assert len(files()) == 2
    journal.prune_free(RUN)
    assert len(files()) == 2
    time.sleep(1.1)
    journal.prune_free(RUN)
    assert files() == [] and journal.entries(RUN, [1]) == [None]


def test_samples_in_a_row_are_taken_together(journal: Journal) -> None:
    sample = NewEntry("sample", b"s")
    send(journal, sample, sample, NewEntry("optim_step", b""), sample)
    first = journal.take(RUN, 1)
    assert first is not None and first.seq == 1
    second = journal.take_ahead(RUN, 1, 2)
    assert second is not None and (second.number, second.body) == (2, b"s")
    assert journal.take_ahead(RUN, 1, 3) is None, "the step comes first"
    assert journal.take_ahead(RUN, 1, 9) is None
    journal.commit(RUN, 1, first, DONE)
    journal.commit(RUN, 1, second, DONE)
    assert head(journal).applied == 2
