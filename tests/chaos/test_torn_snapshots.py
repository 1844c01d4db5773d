"""A write that is cut short leaves the old or the new, never a mix; a damaged file is never taken."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import Reference
from tests.chaos.course import course, difference
from tests.chaos.harness import Chaos, chaos_stack, kill
from tests.chaos.preload import library
from tests.support.api import Run
from tests.support.disk import filled, small_disk
from tests.support.inside import until
from workers.settings import MIB

DONE = 0
STORAGE_FULL = 256
KILLED = 9


@pytest.mark.parametrize("what", ["snapshot", "adapter", "state"])
def test_every_file_operation(what: str, tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.torn", what, str(tiny_model), str(tmp_path)]
    environment = {**os.environ, "LD_PRELOAD": str(library()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    # Making a scratch folder, each file, each sync, the rename: fewer would mean that they go unseen.
    assert len(cases) >= 3 * 10
    for case in cases:
        assert case["found"] in ("old", "new"), case
        if case["mode"] == "no space":
            # Nothing is left of what was refused; where only files were still removed, it was done.
            expected = {STORAGE_FULL: "old", DONE: "new"}
            assert case["found"] == expected.get(case["status"]), case
        else:
            assert case["status"] == KILLED, case
        assert case["again"] == [0, "new"], case
        # No more than the folder of the process that ended last.
        assert len(case["left"]) <= 1, case
    found = Counter((case["mode"], case["found"]) for case in cases)
    assert found["killed before", "old"] and found["killed within", "new"]
    assert found["no space", "old"] >= 10


def snapshot_files(chaos: Chaos, run: Run) -> list[Path]:
    """The files of the run's snapshots, oldest snapshot first."""
    folder = chaos.stack.data_dir / "store" / "runs" / run.id / "snapshots"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def unlink(path: Path, chance: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "state.safetensors"),
        pytest.param(truncate, "state.safetensors", marks=pytest.mark.long),
        pytest.param(unlink, "state.safetensors", marks=pytest.mark.long),
        pytest.param(flip, "manifest.json", marks=pytest.mark.long),
        pytest.param(truncate, "manifest.json", marks=pytest.mark.long),
    ],
)
def test_a_damaged_snapshot_is_named_and_the_one_before_it_is_used(
    chaos: Chaos, reference: Reference, chance: random.Random, damage: Any, name: str
) -> None:
    operations = course()
    middle = len(operations) // 2
    with chaos.run() as run:
        results = chaos.train(run, operations=operations[:middle])
        newest = await_two_snapshots(chaos, run)
        damage(newest.with_name(name), chance)
        worker = chaos.victim("worker_child", run.id)
        assert worker is not None
        kill(worker)
        results += chaos.train(run, operations=operations[middle:])
        assert difference(results, reference.results) is None
        assert chaos.certificate(run)["sha256"] == reference.certificate["sha256"]
        events = until(lambda: damaged_events(run), 20)
        assert newest.parent.name in events[0]["data"]["key"]
        assert name in json.dumps(events[0]["data"])


def await_two_snapshots(chaos: Chaos, run: Run) -> Path:
    """Until there are two and no other one is on its way; the manifest of the newest."""

    def settled() -> Path | None:
        before = [path for path in snapshot_files(chaos, run) if path.name == "manifest.json"]
        time.sleep(0.4)
        after = [path for path in snapshot_files(chaos, run) if path.name == "manifest.json"]
        return after[-1] if before == after and len(after) > 1 else None

    return until(settled, 20)


def damaged_events(run: Run) -> list[dict[str, Any]]:
    rows = run.get("/events").json()["data"]
    return [row for row in rows if row["type"] == "snapshot_damaged"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_full_disk_stops_snapshots_and_nothing_else(
    tmp_path: Path, tiny_model: Path, reference: Reference
) -> None:
    """The disk is full for a third of the course: training goes on, and a kill afterwards loses nothing."""
    operations = course()
    data_dir = tmp_path / "disk"
    with small_disk(data_dir, megabytes=96) as mounted:
        if not mounted:
            pytest.skip("the right to mount a small file system, to fill it")
        with chaos_stack(tmp_path, tiny_model, data_dir=data_dir) as chaos, chaos.run() as run:
            third = len(operations) // 3
            results = chaos.train(run, operations=operations[:third])
            with filled(data_dir, leave=MIB // 2):
                results += chaos.train(run, operations=operations[third : 2 * third])
            worker = chaos.victim("worker_child", run.id)
            assert worker is not None
            kill(worker)
            results += chaos.train(run, operations=operations[2 * third :])
            assert difference(without_save(results), without_save(reference.results)) is None


def without_save(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On a full disk the save of the course may fail; every other answer is equal."""
    return [one for one in results if "manifest" not in one and one.get("error") != "storage_full"]
