"""Kills by the kernel for memory: counted, and claimed by one death each."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_pool.memory import OutOfMemory, find_counter


class Counter:
    """A counter file and a clock, set by hand."""

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 100.0
        self.set(3)

    def set(self, count: int) -> None:
        self.path.write_text(f"low 0\noom 9\noom_kill {count}\noom_group_kill 7\n")

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    return Counter(tmp_path / "memory.events")


def test_a_kill_is_claimed_once(counter: Counter) -> None:
    memory = OutOfMemory(counter.path, counter)
    assert not memory.claim()
    counter.set(4)
    assert memory.claim()
    assert not memory.claim()
    counter.set(6)
    assert [memory.claim() for _ in range(3)] == [True, True, False]


def test_a_kill_that_was_another_process_is_forgotten(counter: Counter) -> None:
    memory = OutOfMemory(counter.path, counter)
    counter.set(4)
    memory.look()
    counter.now += 4
    memory.look()
    assert memory.claim()
    counter.set(5)
    memory.look()
    counter.now += 6
    assert not memory.claim()


def test_without_a_counter_nothing_is_claimed(counter: Counter) -> None:
    assert not OutOfMemory(None).claim()
    memory = OutOfMemory(counter.path, counter)
    counter.path.unlink()
    assert not memory.claim()


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/a b/c\n", "a b/c/memory.events"),
        ("0::/elsewhere\n", "memory.events"),
        ("9:name=systemd:/\n4:cpu,memory:/x\n0::/\n", "memory/x/memory.oom_control"),
        ("4:memory:/not/ours\n", "memory/memory.oom_control"),
    ],
)
def test_the_counter_of_the_own_group_is_found(tmp_path: Path, groups: str, file: str) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(groups)
    counter = root / file
    counter.parent.mkdir(parents=True)
    counter.write_text("oom_kill 0\n")
    assert find_counter(own, root, tmp_path / "none") == counter


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    machine = tmp_path / "vmstat"
    machine.write_text("pgfault 1\noom_kill 2\n")
    assert find_counter(tmp_path / "none", tmp_path, machine) == machine
    assert find_counter(tmp_path / "none", tmp_path, tmp_path / "none") is None
    assert find_counter() is not None
