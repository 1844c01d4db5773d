"""Snapshots and saved states in S3, on moto's server: what one host wrote another restores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3 import BUCKET, running_s3, s3_environment
from tests.support.valkey import settings_for
from tests.unit.engine.support import make_rows, make_trainer
from workers.engine.base import load_base
from workers.engine.certificate import certificate
from workers.engine.trainer import Trainer
from workers.session.artifacts import load_artifact, save_adapter
from workers.session.snapshots import Snapshots
from workers.storage import Storage, open_storage


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with running_s3() as url, s3_environment(url):
        yield


def _host(folder: Path) -> Storage:
    url = f"s3://{BUCKET}/{folder.parent.name}"
    return open_storage(settings_for(folder, "redis://unused", storage=url))


def _runs(model: Path) -> tuple[Trainer, Trainer]:
    """One that has a history, and one on another host."""
    first, second = (make_trainer(load_base(model, threads=1), seed=seed) for seed in (1, 2))
    for seed in range(2):
        first.forward_backward(make_rows((9, 20), seed=seed), "causal_lm", {}, True)
        if seed == 0:
            first.optim_step()
    return first, second


@pytest.mark.usefixtures("server")
def test_another_host_restores(tmp_path: Path, tiny_model: Path) -> None:
    run, other = _runs(tiny_model)
    here = Snapshots(_host(tmp_path / "a"), "run_1")
    there = Snapshots(_host(tmp_path / "b"), "run_1")
    infos = [here.write(run.capture(), {"seq": seq, "epoch": 1}) for seq in (1, 2, 3)]
    assert there.infos() == here.infos() == infos[::-1]
    there.storage.write(f"{infos[2].key}/state.safetensors", b"torn")
    loaded = there.newest_good()
    assert loaded is not None and loaded.info == infos[1]
    assert loaded.damaged == ((infos[2].key, "state.safetensors"),)
    other.restore(loaded.state)
    assert certificate(other.capture()) == certificate(run.capture())
    there.prune({infos[1].key})
    assert [info.seq for info in here.infos()] == [3, 2]


@pytest.mark.usefixtures("server")
def test_a_saved_state_is_loaded_by_another_host(tmp_path: Path, tiny_model: Path) -> None:
    run, other = _runs(tiny_model)
    facts = {"run_id": "run_1", "seq": 4, "base_model": "tiny", "config": {}}
    manifest = save_adapter(_host(tmp_path / "a"), run, "mine", "state", facts)
    key = "runs/run_1/artifacts/mine"
    loaded = load_artifact(_host(tmp_path / "b"), key, other, optimizer=True)
    assert loaded["files"] == manifest["files"]
    run.clear_accumulation()
    assert certificate(other.capture()) == certificate(run.capture())
