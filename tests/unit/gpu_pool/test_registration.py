"""A host's standing in SQL: who serves which lease, and who may judge another host lost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gpu_pool import hosts, leases
from gpu_pool.database import Database
from gpu_pool.devices import Slot
from gpu_pool.registration import HOST_LOST_S, RENEW_S, Registration
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
        lease = leases.acquire(session, host)
    assert lease is not None
    return lease


def test_own_leases_that_nobody_serves_are_named(database: Database, clock: Clock) -> None:
    Registration(database, "a", SLOTS, clock).renew([])
    lease = lease_to(database, "a")
    again = Registration(database, "a", SLOTS, clock)
    assert again.renew([lease.id]) == []
    assert again.done
    clock.now += RENEW_S
    assert again.renew([]) == [(lease, "the server was restarted")]


def test_between_two_signs_of_life_nothing_is_asked(database: Database, clock: Clock) -> None:
    registered = Registration(database, "a", SLOTS, clock)
    registered.renew([])
    lease_to(database, "a")
    clock.now += RENEW_S / 2
    assert registered.renew([]) == []


def test_a_silent_host_is_lost_once_this_one_was_in_touch_long_enough(
    database: Database, clock: Clock
) -> None:
    with database.writing() as session:
        hosts.register(session, "b", SLOTS)
    lease = lease_to(database, "b")
    with database.writing() as session:
        session.get_one(Host, "b").heartbeat_at -= timedelta(minutes=5)
    registered = Registration(database, "a", SLOTS, clock)
    for _ in range(int(HOST_LOST_S / RENEW_S)):
        assert registered.renew([]) == []
        clock.now += RENEW_S
    assert [found for found, _ in registered.renew([])] == [lease]
    clock.now += 4 * RENEW_S  # SQL was away
    assert registered.renew([]) == []


def test_a_host_that_is_taken_down_says_so(database: Database) -> None:
    registered = Registration(database, "a", SLOTS)
    registered.renew([])
    registered.take_down()
    with database.reading() as session:
        shown = leases.describe(session)
    assert shown["hosts"][0]["state"] == "down"
    assert shown["slots"][0]["state"] == "down"
