"""A host's standing in SQL: who serves which lease, and who may judge another host lost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gpu_pool import grants, hosts, leases, overview
from gpu_pool.database import Database
from gpu_pool.devices import Slot
from gpu_pool.registration import HOST_LOST_S, RENEW_S, Found, Registration
from gpu_pool.tables import Host

SLOTS = [Slot("cpu0", "cpu", "CPU", 1000, 1)]


class Clock:
    """The monotonic clock, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease_to(database: Database, host: str) -> leases.Lease:
    with database.writing() as session:
        leases.request(session, f"run_{host}", {"base_model": "tiny", "config": {}})
        lease = grants.acquire(session, host)
    assert lease is not None
    return lease


def test_own_leases_that_nobody_serves_are_named(database: Database, clock: Clock) -> None:
    Registration(database, "a", SLOTS, clock).renew([])
    lease = lease_to(database, "a")
    again = Registration(database, "a", SLOTS, clock)
    assert again.renew([lease.id]) == Found()
    assert again.done
    clock.now += RENEW_S
    ((found, how),) = again.renew([]).unserved
    assert found == lease
    assert how.reason == "worker_lost"
    assert not how.blame


def test_served_leases_that_are_over_are_named(database: Database, clock: Clock) -> None:
    registered = Registration(database, "a", SLOTS, clock)
    registered.renew([])
    lease = lease_to(database, "a")
    with database.writing() as session:
        leases.requeue(session, lease, "host_lost")
    clock.now += RENEW_S
    assert registered.renew([lease.id]) == Found(over={lease.id})


def test_between_two_signs_of_life_nothing_is_asked(database: Database, clock: Clock) -> None:
    registered = Registration(database, "a", SLOTS, clock)
    registered.renew([])
    lease_to(database, "a")
    clock.now += RENEW_S / 2
    assert registered.renew([]) == Found()


def silence(database: Database, host: str, minutes: float) -> None:
    """The host's last sign of life is older by so much, by the database's clock."""
    with database.writing() as session:
        session.get_one(Host, host).heartbeat_at -= timedelta(minutes=minutes)


def lost(registered: Registration) -> list[leases.Lease]:
    return [lease for lease, how in registered.renew([]).unserved if how.reason == "host_lost"]


def test_a_silent_host_is_lost_once_this_one_was_in_touch_long_enough(
    database: Database, clock: Clock
) -> None:
    with database.writing() as session:
        hosts.register(session, "b", SLOTS)
    lease = lease_to(database, "b")
    silence(database, "b", 5)
    registered = Registration(database, "a", SLOTS, clock)
    for _ in range(int(HOST_LOST_S / RENEW_S)):
        assert lost(registered) == []
        clock.now += RENEW_S
    assert lost(registered) == [lease]
    clock.now += 4 * RENEW_S  # SQL was away
    assert lost(registered) == []


def test_a_clock_that_jumps_loses_no_host(database: Database, clock: Clock) -> None:
    with database.writing() as session:
        hosts.register(session, "b", SLOTS)
    lease_to(database, "b")
    registered = Registration(database, "a", SLOTS, clock)
    for second in range(0, 300, int(RENEW_S)):
        if second % 30 == 0:
            with database.writing() as session:
                hosts.renew(session, "b")
        if second % 60 == 10:
            silence(database, "b", 60)  # seen from a clock that went an hour on
        assert lost(registered) == []
        clock.now += RENEW_S


def test_the_leases_of_a_host_that_was_stopped_are_taken_at_once(
    database: Database, clock: Clock
) -> None:
    with database.writing() as session:
        hosts.register(session, "b", SLOTS)
    lease = lease_to(database, "b")
    with database.writing() as session:
        hosts.take_down(session, "b")
    assert lost(Registration(database, "a", SLOTS, clock)) == [lease]


def test_no_lease_expires_while_sql_is_away(database: Database, clock: Clock) -> None:
    """Whoever comes back first finds old heartbeats everywhere; nobody may conclude anything."""
    both = {host: Registration(database, host, SLOTS, clock) for host in "ab"}
    for registered in both.values():
        registered.renew([])
    lease = lease_to(database, "b")
    clock.now += 600
    silence(database, "b", 10)
    for _ in range(3):
        assert lost(both["a"]) == []
        clock.now += RENEW_S
    assert both["b"].renew([lease.id]) == Found()
    for _ in range(30):
        clock.now += RENEW_S
        assert lost(both["a"]) == []
        assert both["b"].renew([lease.id]) == Found()


def test_a_host_that_is_taken_down_says_so(database: Database) -> None:
    registered = Registration(database, "a", SLOTS)
    registered.renew([])
    registered.take_down()
    with database.reading() as session:
        shown = overview.describe(session)
    assert shown["hosts"][0]["state"] == "down"
    assert shown["slots"][0]["state"] == "down"
