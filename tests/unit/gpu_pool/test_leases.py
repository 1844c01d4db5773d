"""Leases in SQL: one run per slot, one slot per run, epochs that only grow, whoever comes when."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from gpu_pool import grants, hosts, leases, of_run, overview
from gpu_pool.database import Database
from gpu_pool.devices import Slot
from gpu_pool.grants import WarmWorker
from gpu_pool.leases import MOVED, START_FAILED, Lease, Standing
from gpu_pool.placement import Warmth
from gpu_pool.tables import Host, LeaseRequest, LeaseRow

WANTS: dict[str, Any] = {"base_model": "tiny", "config": {"lora_r": 8}}


def slots(count: int, kind: str = "cpu") -> list[Slot]:
    return [Slot(f"{kind}{number}", kind, "device", 1000, 1) for number in range(count)]


def set_up(database: Database, host: str = "h", count: int = 2, runs: int = 0) -> None:
    with database.writing() as session:
        hosts.register(session, host, slots(count))
        for number in range(runs):
            leases.request(session, f"run_{number}", WANTS)


def acquire(database: Database, host: str = "h", **options: Any) -> Lease | None:
    with database.writing() as session:
        return grants.acquire(session, host, **options)


def granted(database: Database, host: str = "h", **options: Any) -> Lease:
    lease = acquire(database, host, **options)
    assert lease is not None
    return lease


def release(database: Database, lease: Lease) -> bool:
    with database.writing() as session:
        return leases.release(session, lease, "ended")


def requeue(database: Database, lease: Lease, reason: str, **options: Any) -> bool:
    with database.writing() as session:
        return leases.requeue(session, lease, reason, **options)


def test_oldest_first_one_per_slot(database: Database) -> None:
    set_up(database, count=2, runs=3)
    first, second = granted(database), granted(database)
    assert (first.run_id, second.run_id) == ("run_0", "run_1")
    assert {first.slot, second.slot} == {"cpu0", "cpu1"}
    assert acquire(database) is None
    assert release(database, first)
    third = granted(database)
    assert (third.run_id, third.slot, third.epoch) == ("run_2", first.slot, 1)
    assert third.requirements == WANTS


def test_release_happens_once(database: Database) -> None:
    set_up(database, runs=1)
    lease = granted(database)
    assert release(database, lease)
    assert not release(database, lease)


def test_the_epoch_of_a_run_grows_with_every_lease(database: Database) -> None:
    set_up(database, runs=1)
    epochs = []
    for _ in range(3):
        lease = granted(database)
        epochs.append(lease.epoch)
        assert requeue(database, lease, "worker_lost")
    assert epochs == [1, 2, 3]


def test_a_run_that_lost_its_worker_is_served_before_all_that_had_none(database: Database) -> None:
    set_up(database, count=1, runs=3)
    first = granted(database)
    assert requeue(database, first, "worker_lost")
    again = granted(database)
    assert (again.run_id, again.epoch) == ("run_0", 2)
    assert not requeue(database, first, "worker_lost")
    assert acquire(database) is None
    with database.reading() as session:
        assert leases.open_leases(session, "h") == [again]


def test_a_paused_run_waits_for_its_owner_and_keeps_its_place(database: Database) -> None:
    set_up(database, count=1, runs=2)
    assert requeue(database, granted(database), "paused", state="paused")
    assert granted(database).run_id == "run_1"
    with database.writing() as session:
        assert leases.paused(session) == ["run_0"]
        assert leases.queue_position(session, "run_0") is None
        assert leases.resume(session, "run_0")
        assert not leases.resume(session, "run_0")
        assert leases.queued(session) == ["run_0"]
        assert leases.pause(session, "run_0")
        assert not leases.pause(session, "run_0")
        assert leases.queued(session) == []
        assert overview.describe(session)["paused"][0]["run_id"] == "run_0"
        assert leases.withdraw(session, "run_0")
        assert leases.withdrawn(session) == ["run_0"]


def test_a_run_that_ended_is_not_put_back(database: Database) -> None:
    set_up(database, count=1, runs=1)
    lease = granted(database)
    with database.writing() as session:
        assert not leases.withdraw(session, "run_0")
        assert leases.standing(session, "run_0") == Standing(leased=False, known_seq=0)
    assert requeue(database, lease, "worker_lost")
    with database.reading() as session:
        assert leases.queued(session) == []
        assert leases.withdrawn(session) == ["run_0"]


def test_an_ended_run_that_held_a_lease_is_done_with_it(database: Database) -> None:
    set_up(database, count=1, runs=1)
    lease = granted(database)
    with database.writing() as session:
        leases.withdraw(session, "run_0")
    assert release(database, lease)
    with database.reading() as session:
        assert leases.withdrawn(session) == []


def test_starts_that_failed_are_counted_since_the_run_was_last_ready(database: Database) -> None:
    set_up(database, count=1, runs=1)
    counts = []
    for reason in (START_FAILED, START_FAILED, "worker_lost", START_FAILED):
        requeue(database, granted(database), reason)
        with database.reading() as session:
            counts.append(leases.failed_starts(session, "run_0"))
    assert counts == [1, 2, 0, 1]


def test_what_sql_knows_of_a_run(database: Database) -> None:
    set_up(database, count=1, runs=1)
    with database.writing() as session:
        leases.note_seq(session, "run_0", 7)
        leases.note_seq(session, "run_9", 7)
        assert leases.standing(session, "run_0") == Standing(leased=False, known_seq=7)
        assert leases.standing(session, "run_9") is None
    granted(database)
    with database.writing() as session:
        leases.note_seq(session, "run_0", 3)
        assert leases.standing(session, "run_0") == Standing(leased=True, known_seq=3)


def test_owners_of_runs_that_wait_and_are_not_just_being_made(database: Database) -> None:
    set_up(database, count=1)
    with database.writing() as session:
        for number in range(3):
            leases.request(session, f"run_{number}", {**WANTS, "owner": f"user_{number}"})
        session.flush()
        for run_id in ("run_0", "run_1"):
            row = session.scalars(select(LeaseRequest).where(LeaseRequest.run_id == run_id)).one()
            row.requested_at -= timedelta(minutes=1)
    everybody = ["run_0", "run_1", "run_2", "run_9"]
    with database.reading() as session:
        old = leases.owners(session, everybody, timedelta(seconds=10))
    assert old == {"run_0": "user_0", "run_1": "user_1"}
    granted(database)
    with database.reading() as session:
        assert leases.owners(session, everybody, timedelta(seconds=10)) == {"run_1": "user_1"}


def test_a_repeated_request_changes_nothing(database: Database) -> None:
    set_up(database, runs=1)
    granted(database)
    with database.writing() as session:
        leases.request(session, "run_0", WANTS)
    assert acquire(database) is None


def test_a_request_must_say_what_the_worker_needs(database: Database) -> None:
    with database.writing() as session, pytest.raises(ValueError, match="base_model, config"):
        leases.request(session, "run_0", {})


def test_withdrawn_requests_are_not_served(database: Database) -> None:
    set_up(database, runs=2)
    with database.writing() as session:
        assert leases.withdraw(session, "run_0")
        assert not leases.withdraw(session, "run_0")
        assert not leases.withdraw(session, "run_9")
        assert leases.queued(session) == ["run_1"]
        assert leases.withdrawn(session) == ["run_0"]
        leases.cleared(session, ["run_0", "run_1"])
        assert leases.withdrawn(session) == []
    assert granted(database).run_id == "run_1"


def test_among_and_warmth_steer_the_choice(database: Database) -> None:
    set_up(database, runs=3)
    warm = {"cpu1": WarmWorker(Warmth.IDLE, "tiny")}
    lease = granted(database, among=["run_2"], warm=warm)
    assert (lease.run_id, lease.slot) == ("run_2", "cpu1")


def test_queue_positions(database: Database) -> None:
    set_up(database, count=1, runs=3)
    granted(database)
    with database.reading() as session:
        positions = [leases.queue_position(session, f"run_{n}") for n in range(4)]
    assert positions == [None, 0, 1, None]


def test_a_host_serves_its_own_slots_only(database: Database) -> None:
    set_up(database, "a", count=1, runs=2)
    set_up(database, "b", count=1)
    assert granted(database, "b").host == "b"
    assert acquire(database, "b") is None
    assert granted(database, "a").host == "a"


def test_a_slot_that_is_gone_takes_no_lease(database: Database) -> None:
    set_up(database, count=2, runs=2)
    lease = granted(database)
    set_up(database, count=0)
    assert acquire(database) is None
    with database.reading() as session:
        assert leases.open_leases(session, "h") == [lease]
        assert overview.describe(session)["slots"] == []
    set_up(database, count=2)
    assert granted(database).slot != lease.slot


def test_silent_and_stopped_hosts_lose_their_leases(database: Database) -> None:
    for host in ("up", "down", "silent"):
        set_up(database, host, count=1)
    with database.writing() as session:
        for host in ("up", "down", "silent"):
            leases.request(session, f"run_{host}", WANTS)
            grants.acquire(session, host, among=[f"run_{host}"])
        hosts.take_down(session, "down")
        old = session.scalars(select(Host).where(Host.name == "silent")).one()
        old.heartbeat_at -= timedelta(minutes=2)
    with database.reading() as session:
        lost = leases.orphaned_leases(session, timedelta(seconds=60))
    assert sorted(lease.host for lease in lost) == ["down", "silent"]
    with database.writing() as session:
        hosts.renew(session, "silent")
        assert [x.host for x in leases.orphaned_leases(session, timedelta(seconds=60))] == ["down"]


def age(database: Database, lease: Lease, seconds: float) -> None:
    """Sets the end of a lease back."""
    with database.writing() as session:
        row = session.get_one(LeaseRow, lease.id)
        assert row.released_at is not None
        row.released_at -= timedelta(seconds=seconds)


def test_a_moved_run_goes_elsewhere_if_it_can(database: Database) -> None:
    set_up(database, count=2, runs=2)
    first = granted(database)
    assert requeue(database, first, MOVED)
    second = granted(database)
    assert (second.run_id, second.slot) == ("run_0", "cpu1")
    # Nothing else is free: it comes back.
    granted(database)
    assert requeue(database, second, MOVED)
    assert granted(database).slot == "cpu1"


def register(database: Database, host: str, device: str) -> None:
    with database.writing() as session:
        hosts.register(session, host, [Slot("cpu0", "cpu", device, 1000, 1)])


def test_a_rebuild_is_left_to_a_host_with_the_same_device_for_a_while(database: Database) -> None:
    register(database, "a", "one model")
    with database.writing() as session:
        leases.request(session, "run_0", WANTS)
    lease = granted(database, "a")
    register(database, "b", "another model")
    register(database, "c", "one model")
    assert requeue(database, lease, "worker_lost")
    with database.writing() as session:
        hosts.register(session, "a", [])
    assert acquire(database, "b") is None
    age(database, lease, 11)
    assert granted(database, "b").run_id == "run_0"


def test_a_rebuild_takes_any_device_when_there_is_none_of_its_kind(database: Database) -> None:
    register(database, "a", "one model")
    with database.writing() as session:
        leases.request(session, "run_0", WANTS)
    lease = granted(database, "a")
    register(database, "b", "another model")
    register(database, "c", "one model")
    assert requeue(database, lease, "host_lost")
    with database.writing() as session:
        hosts.register(session, "a", [])
        # What has been silent is not waited for.
        session.get_one(Host, "c").heartbeat_at -= timedelta(minutes=1)
    assert granted(database, "b").run_id == "run_0"


def test_what_waiting_runs_ask_for(database: Database) -> None:
    set_up(database, count=1, runs=2)
    with database.writing() as session:
        leases.request(session, "run_large", {**WANTS, "memory_bytes": 5, "kind": "cuda"})
    requeue(database, granted(database), MOVED)
    with database.reading() as session:
        wishes = grants.wishes(session, ["run_0", "run_large", "run_9"])
    assert [(it.run_id, it.kind, it.memory_bytes, it.avoid) for it in wishes] == [
        ("run_0", None, 0, "h/cpu0"),
        ("run_large", "cuda", 5, ""),
    ]


def test_describe(database: Database) -> None:
    set_up(database, count=2, runs=2)
    granted(database, among=["run_1"])
    with database.reading() as session:
        shown = overview.describe(session)
    assert [host["state"] for host in shown["hosts"]] == ["up"]
    held = [[run["run_id"] for run in slot["runs"]] for slot in shown["slots"]]
    assert [(slot["name"], slot["state"]) for slot in shown["slots"]] == [
        ("cpu0", "leased"),
        ("cpu1", "free"),
    ]
    assert held == [["run_1"], []]
    assert [(entry["run_id"], entry["position"]) for entry in shown["queued"]] == [("run_0", 0)]


def test_the_database_itself_refuses_a_run_s_second_lease(database: Database) -> None:
    set_up(database, count=2, runs=1)
    granted(database)
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(LeaseRow(run_id="run_0", slot_id=2, epoch=7))


# --- runs that share --------------------------------------------------------------------------


def share_wishes(database: Database, *runs: tuple[str, dict[str, Any]]) -> None:
    with database.writing() as session:
        for run_id, wants in runs:
            leases.request(session, run_id, WANTS | wants)


def of_base(name: str, own: int = 100, **more: Any) -> dict[str, Any]:
    share = {"base": name, "base_bytes": 500, "own_bytes": own, "work_bytes": 100}
    return {"shares": {"cpu": share}, **more}


EVERY = {f"cpu{number}": WarmWorker(Warmth.WARM, "tiny", takes=8) for number in range(4)}


def test_runs_spread_over_free_slots_and_share_when_none_is_left(database: Database) -> None:
    set_up(database, count=2)
    share_wishes(database, *((f"run_{number}", of_base("m")) for number in range(5)))
    found = [granted(database, warm=EVERY) for _ in range(4)]
    assert [lease.slot for lease in found] == ["cpu0", "cpu1", "cpu0", "cpu1"]
    assert [lease.epoch for lease in found] == [1, 1, 1, 1]
    with database.reading() as session:
        assert of_run.neighbours(session, ["run_0", "run_1", "run_4"]) == {"run_0": 1, "run_1": 1}
    assert requeue(database, found[0], "worker_lost")
    with database.reading() as session:
        assert of_run.neighbours(session, ["run_0", "run_2"]) == {"run_2": 0}


def test_who_does_not_join(database: Database) -> None:
    set_up(database, count=1)
    share_wishes(
        database,
        ("run_0", of_base("m", own=150)),
        ("another_base", of_base("n")),
        ("alone", of_base("m", dedicated=True)),
        ("unknown_size", {}),
        ("too_large", of_base("m", own=251)),
        ("fits", of_base("m", own=250)),
    )
    assert granted(database, warm=EVERY).run_id == "run_0"
    assert granted(database, warm=EVERY).run_id == "fits"
    assert acquire(database, warm=EVERY) is None


def test_nobody_joins_a_run_that_is_to_be_alone_or_a_worker_that_takes_no_more(
    database: Database,
) -> None:
    set_up(database, count=1)
    share_wishes(database, ("alone", of_base("m", dedicated=True)), ("other", of_base("m")))
    lease = granted(database, warm=EVERY)
    assert lease.run_id == "alone"
    assert acquire(database, warm=EVERY) is None
    assert release(database, lease)
    assert granted(database, warm=EVERY).run_id == "other"
    share_wishes(database, ("third", of_base("m")))
    assert acquire(database, warm={"cpu0": WarmWorker(Warmth.WARM, takes=1)}) is None
    assert granted(database, warm=EVERY).run_id == "third"


def test_a_young_run_is_left_to_a_host_with_a_free_slot(database: Database) -> None:
    set_up(database, "a", count=1)
    share_wishes(database, ("run_0", of_base("m")), ("run_1", of_base("m")))
    assert granted(database, "a", warm=EVERY).run_id == "run_0"
    with database.writing() as session:
        hosts.register(session, "b", slots(1))
        hosts.renew(session, "b")
    assert acquire(database, "a", warm=EVERY) is None
    with database.writing() as session:
        row = session.scalars(select(LeaseRequest).where(LeaseRequest.run_id == "run_1")).one()
        row.requested_at -= timedelta(seconds=60)
    assert granted(database, "a", warm=EVERY).run_id == "run_1"


def test_a_run_can_move_where_it_could_join_others(database: Database) -> None:
    set_up(database, count=2)
    with database.writing() as session:
        hosts.renew(session, "h")
    share_wishes(database, ("run_0", of_base("m")), ("run_1", of_base("m")), ("n", of_base("n")))
    granted(database, warm=EVERY)
    granted(database, warm=EVERY)
    with database.reading() as session:
        assert of_run.another_is_open(session, "run_0", 8)
        assert not of_run.another_is_open(session, "run_0", 1)
        assert not of_run.another_is_open(session, "n", 8)


def test_many_at_once_never_share_a_slot(database: Database) -> None:
    """Eight threads grant and release as fast as they can; holders are counted as they go."""
    set_up(database, count=3, runs=40)
    holders: dict[str, str] = {}
    clashes: list[str] = []
    seen: list[tuple[str, int]] = []
    lock = threading.Lock()

    def serve() -> None:
        while True:
            lease = acquire(database)
            if lease is None:
                with database.reading() as session:
                    if not leases.queued(session):
                        return
                continue
            with lock:
                if lease.slot in holders:
                    clashes.append(lease.slot)
                holders[lease.slot] = lease.run_id
                seen.append((lease.run_id, lease.epoch))
            with lock:
                del holders[lease.slot]
            release(database, lease)

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert clashes == []
    assert sorted(seen) == sorted((f"run_{number}", 1) for number in range(40))
    with database.reading() as session:
        still_open = select(func.count()).where(LeaseRow.released_at.is_(None))
        assert session.scalar(still_open) == 0
