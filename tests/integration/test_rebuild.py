"""Sessions on a real journal, lost anywhere and rebuilt: no number changes, and what differs is said."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from schemas.errors import SignalError
from tests.support.sessions import CONFIG, Sessions, batch, history, loop, numbers, step
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.canonical import digest
from workers.engine import memory
from workers.queue import keys
from workers.queue.journal import Closed, Fenced, Journal, connect
from workers.queue.records import NewEntry
from workers.session.artifacts import FORMAT
from workers.session.session import Session
from workers.storage import LocalStorage, artifact_key
from workers.storage.manifest import read_sealed
from workers.text.rows import Row, pack_rows

RUN, OTHER = "run_0123456789abcdef", "run_00000000000000aa"
PLAN = loop(8)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def sessions(valkey: Valkey, tmp_path: Path, tiny_model: Path) -> Iterator[Sessions]:
    redis = connect(valkey.url)
    redis.flushall()
    # Snapshots when the test says so.
    settings = settings_for(tmp_path, valkey.url, snapshot_share=1e-9)
    journal = Journal(redis, LocalStorage(tmp_path / "store"), settings)
    journal.open_run(RUN, "user_1")
    yield Sessions(journal, tiny_model)
    redis.close()


@pytest.fixture
def undisturbed(sessions: Sessions) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The plan's numbers and last certificate in a run that nobody disturbs."""
    journal = sessions.journal
    journal.open_run(OTHER, "user_1")
    journal.append(OTHER, PLAN)
    session = sessions.attach(OTHER, 1)
    session.drain()
    return numbers(journal, OTHER, len(PLAN)), proof(session)


def proof(session: Session) -> dict[str, Any]:
    return session.primitives.certificate()


def head_of(sessions: Sessions) -> Any:
    head = sessions.journal.head(RUN)
    assert head is not None
    return head


def events(sessions: Sessions, kind: str) -> list[bytes]:
    rows: Any = sessions.journal.redis.xrange(keys.COMMITS)
    return [
        row[b"data"]
        for _, row in rows
        if (row[b"type"], row[b"run"]) == (kind.encode(), RUN.encode())
    ]


@pytest.mark.parametrize("snapshots", [(), (3,), (3, 7), (0, 2, 5, 9, 14)])
def test_a_worker_lost_anywhere_changes_no_number(
    sessions: Sessions, undisturbed: tuple[Any, Any], snapshots: tuple[int, ...]
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    for number, entry in enumerate(PLAN):
        if number in snapshots:
            assert session.snapshot_now()
        journal.append(RUN, [entry])
        session.drain()
        if number % 2:
            session = sessions.attach(RUN, number + 2)
    assert (numbers(journal, RUN, len(PLAN)), proof(session)) == undisturbed
    head = head_of(sessions)
    assert (head.applied, head.hold) == (len(PLAN), "")
    assert head.base == (sorted(snapshots)[-2] if len(snapshots) > 1 else 0)


@pytest.mark.parametrize("gone", [False, True])
def test_what_was_loaded_may_be_deleted(sessions: Sessions, gone: bool) -> None:
    """A run needs nothing of another's any more once its load has ended, whoever dies."""
    journal = sessions.journal
    journal.open_run(OTHER, "user_1")
    journal.append(OTHER, [*loop(2), NewEntry("save_state", packed(name="one", mode="state"))])
    sessions.attach(OTHER, 1).drain()
    key = artifact_key(OTHER, "one")
    sealed = digest(read_sealed(journal.storage, key, FORMAT))
    load = NewEntry("load_state", packed(key=key, sha256=sealed, optimizer=True))
    if gone:
        journal.storage.delete(key)
    journal.append(RUN, [batch(1), step(), load])
    session = sessions.attach(RUN, 1)
    session.drain()
    (entry,) = journal.entries(RUN, [3])
    assert entry is not None and entry.status == ("failed" if gone else "completed")
    journal.storage.delete(key)
    again = sessions.attach(RUN, 2)
    assert (head_of(sessions).applied, head_of(sessions).hold) == (3, "")
    assert proof(again) == proof(session)


def packed(**body: Any) -> bytes:
    found: bytes = msgpack.packb(body)
    return found


SETTINGS: list[dict[str, Any]] = [
    {"lora_dropout": 0.2, "optimizer": "lion", "use_rslora": True},
    {"use_dora": True, "lr_scheduler": "cosine", "warmup_steps": 2, "total_steps": 9},
    {"train_unembed": True, "train_mlp": False, "lora_rank_pattern": {"q_proj": 2}},
    {"optimizer": "adamw_8bit"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: next(iter(changes)))
def test_a_rebuild_follows_settings_and_recorded_plans(
    sessions: Sessions, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed in small micro-batches is computed in them again where memory is plenty."""
    if changes.get("optimizer") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    journal, config = sessions.journal, {**CONFIG, **changes}
    # Without a rate of its own a step follows the schedule.
    plan = [step(None) if entry.kind == "optim_step" else entry for entry in PLAN]
    journal.append(RUN, plan)
    session = sessions.attach(RUN, 1, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_FEWEST_TOKENS", 4)
        patch.setattr(session.trainer.budget, "ceiling", 8)
        session.drain(until=4)
        assert session.snapshot_now()
        session.drain()
    records = [past.record for past in history(journal, RUN, len(plan))]
    plans = [record["plan"]["batches"] for record in records if "batches" in record["plan"]]
    assert all(len(batches) == 2 for batches in plans) and len(plans) > 6
    again = sessions.attach(RUN, 2, config=config)
    head = head_of(sessions)
    assert (head.applied, head.hold) == (len(plan), "")
    assert proof(again) == proof(session)


def preferred(loss: str, seed: int, **options: Any) -> NewEntry:
    """A forward_backward of two pairs, or of two labelled rows with their mismatched copies."""
    rng, rows = random.Random(seed), []
    for number in range(4):
        ids = [rng.randrange(5, 500) for _ in range(rng.randrange(6, 9))]
        values = {"chosen": float(number % 2 == 0)} if loss == "dpo" else {"label": number % 2}
        counted = array("f", [0.0] + [1.0] * (len(ids) - 2))
        trained = loss == "dpo" or number < 2
        tokens, targets = array("i", ids[:-1]), array("i", ids[1:])
        rows.append(Row(tokens, targets, counted, {}, values, number // 2, trained))
    body = {
        "loss_fn": loss,
        "loss_kwargs": options,
        "accumulate": True,
        "rows": pack_rows(rows),
    }
    return NewEntry("forward_backward", msgpack.packb(body), tokens=20, digest=f"p{seed}")


def test_a_rebuild_follows_every_pass_of_a_loss(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the reference and of a statistic too, and drops what was dropped."""
    journal, config = sessions.journal, {**CONFIG, "lora_dropout": 0.2}
    plan = []
    for number in range(3):
        plan += [preferred("dpo", 2 * number), step(), preferred("kto", 2 * number + 1), step()]
    journal.append(RUN, plan)
    session = sessions.attach(RUN, 1, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_FEWEST_TOKENS", 4)
        patch.setattr(session.trainer.budget, "ceiling", 8)
        session.drain()
    plans = [past.record["plan"] for past in history(journal, RUN, len(plan))][::2]
    assert all(len(one["batches"]) == 2 and len(one["reference"]["batches"]) == 4 for one in plans)
    assert [len(one["statistics"]["batches"]) for one in plans if "statistics" in one] == [2] * 3
    again = sessions.attach(RUN, 2, config=config)
    head = head_of(sessions)
    assert (head.applied, head.hold) == (len(plan), "")
    assert proof(again) == proof(session)


def test_a_zombie_cannot_answer_and_its_successor_goes_on(
    sessions: Sessions, undisturbed: tuple[Any, Any]
) -> None:
    journal = sessions.journal
    journal.append(RUN, PLAN)
    zombie = sessions.attach(RUN, 1)
    zombie.drain(until=6)
    session = sessions.attach(RUN, 2)
    with pytest.raises(Fenced):
        zombie.drain()
    assert not zombie.snapshot_now()
    session.drain()
    assert (numbers(journal, RUN, len(PLAN)), proof(session)) == undisturbed


def test_a_damaged_snapshot_is_passed_over_and_named(
    sessions: Sessions, undisturbed: tuple[Any, Any], tmp_path: Path
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    for part in (PLAN[:4], PLAN[4:9]):
        journal.append(RUN, part)
        session.drain()
        assert session.snapshot_now()
    newest = sorted(tmp_path.rglob("state.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(bytes(data))
    journal.append(RUN, PLAN[9:])
    session = sessions.attach(RUN, 2)
    session.drain()
    assert (numbers(journal, RUN, len(PLAN)), proof(session)) == undisturbed
    assert b"state.safetensors" in events(sessions, "snapshot_damaged")[0]


def test_another_number_than_the_recorded_holds_the_run(sessions: Sessions) -> None:
    journal = sessions.journal
    journal.append(RUN, PLAN[:6])
    sessions.attach(RUN, 1).drain()
    entry = keys.prefix(RUN) + "e:3"
    record: bytes = journal.redis.hget(entry, "rec")  # type: ignore[assignment]
    journal.redis.hset(entry, "rec", record.replace(b'"loss": ', b'"loss": 1'))
    session = sessions.attach(RUN, 2)
    head = head_of(sessions)
    assert (head.hold, head.hold_info["seq"], head.worker_state) == ("mismatch", 3, "ready")
    assert head.hold_info["recorded"]["loss"] != head.hold_info["rebuilt"]["loss"]
    with pytest.raises(SignalError, match="accept=rebuilt"):
        journal.append(RUN, [step()])
    session.drain()
    assert journal.release(RUN, "mismatch")
    journal.append(RUN, PLAN[6:])
    session.drain()
    assert head_of(sessions).applied == len(PLAN)


def test_another_fingerprint_goes_on_within_tolerance_and_says_so(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = sessions.journal
    journal.append(RUN, PLAN[:6])
    sessions.attach(RUN, 1).drain()
    monkeypatch.setattr(
        "workers.session.session.fingerprint", lambda base: {"dtype": "float32", "torch": "other"}
    )
    entry = keys.prefix(RUN) + "e:3"
    record: bytes = journal.redis.hget(entry, "rec")  # type: ignore[assignment]
    loss = msgpack and float(record.split(b'"loss": ')[1].split(b",")[0])
    journal.redis.hset(
        entry, "rec", record.replace(str(loss).encode(), str(loss * 1.00001).encode())
    )
    sessions.attach(RUN, 2)
    head = head_of(sessions)
    assert (head.hold, head.deterministic_since) == ("", 6)
    assert len(events(sessions, "nondeterministic")) == 1


def test_a_flushed_journal_is_mended_by_the_worker(
    sessions: Sessions, undisturbed: tuple[Any, Any]
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    journal.append(RUN, PLAN[:5])
    session.drain()
    session.snapshot_now()
    journal.append(RUN, PLAN[5:9])
    session.drain()
    journal.redis.flushall()
    session.drain()
    head = head_of(sessions)
    assert (head.applied, head.hold, head.hold_info) == (9, "rolled_back", {"at_seq": 9})
    assert (head.snapshot.seq, head.device["kind"]) == (5, "cpu")
    assert head.fingerprint == session.fingerprint
    journal.release(RUN, "rolled_back")
    journal.append(RUN, PLAN[9:])
    session.drain()
    assert (numbers(journal, RUN, len(PLAN)), proof(session)) == undisturbed
    again = sessions.attach(RUN, 2)
    assert proof(again) == undisturbed[1]


def test_a_flush_that_nobody_outlived_goes_back_to_the_snapshot(
    sessions: Sessions, undisturbed: tuple[Any, Any]
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    journal.append(RUN, PLAN[:5])
    session.drain()
    session.snapshot_now()
    journal.append(RUN, PLAN[5:9])
    session.drain()
    journal.redis.flushall()
    assert journal.reopen(RUN, "user_1", applied=5, entries=5)
    session = sessions.attach(RUN, 2)
    assert head_of(sessions).hold_info == {"at_seq": 5}
    journal.release(RUN, "rolled_back")
    journal.append(RUN, PLAN[5:])
    session.drain()
    assert proof(session) == undisturbed[1]


def test_a_flush_with_a_damaged_snapshot_goes_back_to_the_one_before(
    sessions: Sessions, undisturbed: tuple[Any, Any], tmp_path: Path
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    for part in (PLAN[:3], PLAN[3:7], PLAN[7:9]):
        journal.append(RUN, part)
        session.drain()
        assert session.snapshot_now()
    newest = sorted(tmp_path.rglob("state.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-8])
    journal.redis.flushall()
    assert journal.reopen(RUN, "user_1", applied=9, entries=9)
    session = sessions.attach(RUN, 2)
    assert (head_of(sessions).applied, head_of(sessions).hold_info) == (7, {"at_seq": 7})
    journal.release(RUN, "rolled_back")
    journal.append(RUN, PLAN[7:])
    session.drain()
    assert proof(session) == undisturbed[1]


def test_a_journal_that_sql_knows_more_of_is_rolled_back_by_name(sessions: Sessions) -> None:
    journal = sessions.journal
    journal.append(RUN, PLAN[:4])
    sessions.attach(RUN, 1).drain()
    sessions.attach(RUN, 2, projected_seq=7)
    assert (head_of(sessions).hold, head_of(sessions).hold_info) == ("rolled_back", {"at_seq": 4})


def test_a_branch_begins_with_the_exact_state(
    sessions: Sessions, undisturbed: tuple[Any, Any]
) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    for number, entry in enumerate(PLAN):
        if number in (3, 6, 10):
            session.snapshot_now()
        journal.append(RUN, [entry])
        session.drain()
    for seq in (0, 2, 3, 8, 12):
        branch = f"run_{seq:016x}"
        journal.open_run(branch, "user_1")
        origin = {"run_id": RUN, "seq": seq}
        child = sessions.attach(branch, 1, origin=origin)
        head = journal.head(branch)
        # Before it has done anything of its own.
        assert head is not None and head.state["step"] == child.trainer.step
        assert head.state["step"] == sum(
            past.kind == "optim_step" for past in history(journal, RUN, seq)
        )
        journal.append(branch, PLAN[seq:])
        child.drain()
        mine, other = dict(proof(child)), dict(undisturbed[1])
        assert (mine.pop("state_seq"), other.pop("state_seq")) == (len(PLAN) - seq, len(PLAN))
        assert mine == other
        # It needs its parent no more.
        again = sessions.attach(branch, 2, origin={"run_id": "run_gone", "seq": seq})
        assert proof(again) == proof(child)


@pytest.mark.parametrize(("most", "also_between"), [(1_000, False), (3, True)])
def test_a_whole_model_is_copied_when_nothing_is_accumulated(
    valkey: Valkey, tmp_path: Path, tiny_model: Path, most: int, also_between: bool
) -> None:
    """Unless too many operations would have to be executed again."""
    redis = connect(valkey.url)
    redis.flushall()
    settings = settings_for(tmp_path, valkey.url, snapshot_share=1e9, snapshot_max_operations=most)
    journal = Journal(redis, LocalStorage(tmp_path / "store"), settings)
    journal.open_run(RUN, "user_1")
    sessions = Sessions(journal, tiny_model, own=False)
    session = sessions.attach(RUN, 1, config={**CONFIG, "lora_r": 0})
    seqs = []
    for entry in loop(6, accumulate=6):
        journal.append(RUN, [entry])
        session.drain()
        session.snapshots.wait()
        seqs.append((session.snapshots.seq, entry.kind))
    taken = {seq for seq, _ in seqs if seq > 0}
    steps = {number for number, (_, kind) in enumerate(seqs, 1) if kind == "optim_step"}
    assert taken >= steps
    assert bool(taken - steps) == also_between
    redis.close()


def test_refused_operations_leave_the_same_trace_when_rebuilt(sessions: Sessions) -> None:
    journal = sessions.journal
    broken = NewEntry("forward_backward", batch(1).body.replace(b"cross_entropy", b"cross_entropi"))
    journal.append(RUN, [batch(1), broken, step(), batch(2), step(5e-3), batch(3)])
    session = sessions.attach(RUN, 1)
    session.drain()
    statuses = [entry.status for entry in journal.finished_after(RUN, 0, 9)]
    assert statuses == ["completed", "failed", "failed", "completed", "completed", "completed"]
    assert proof(sessions.attach(RUN, 2)) == proof(session)


def test_a_closed_run_is_let_go_of(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    sessions.journal.append(RUN, [batch(1)])
    sessions.journal.close(RUN, "cancelled")
    with pytest.raises(Closed):
        session.drain()
    session.close()


def test_stopping_leaves_the_rest_in_the_journal(sessions: Sessions) -> None:
    journal = sessions.journal
    session = sessions.attach(RUN, 1)
    journal.append(RUN, PLAN[:3])
    sessions.stopping = True
    session.drain()
    assert head_of(sessions).applied == 0
    sessions.stopping = False
    session.drain()
    session.close()
    assert head_of(sessions).snapshot.seq == 3
