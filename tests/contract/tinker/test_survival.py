"""A worker that dies, a client that vanishes: the SDK's user sees latency and no other number."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.tinker.support import MODEL, PROMPT, STEP, params, plain, service_of
from tests.contract.tinker.wire import Wire
from tests.support import stack as stacks
from tests.support.api import Api, Run
from tests.support.stack import RunningStack
from web.tinker.models import run_id_of

STEPS = 12


def looped(stack: RunningStack, run: Any, kill_at: int | None = None) -> list[float]:
    """The losses of a pipelined loop whose worker is killed behind its step `kill_at`."""
    futures = []
    for number in range(STEPS):
        futures.append(run.forward_backward([plain()], "cross_entropy"))
        run.optim_step(STEP)
        if number == kill_at:
            futures[number // 2].result()
            kill_worker(stack, run.model_id)
    return [future.result().metrics["loss:sum"] for future in futures]


def kill_worker(stack: RunningStack, model_id: str) -> None:
    with Api(stack) as api:
        worker = Run(api, run_id_of(model_id)).get("/session_state").json()["worker"]
    os.kill(worker["pid"], signal.SIGKILL)


def certificate(stack: RunningStack, model_id: str) -> str:
    with Api(stack) as api:
        return str(Run(api, run_id_of(model_id)).get("/certificate").json()["sha256"])


def test_kill_9_of_the_worker_changes_no_number(stack: RunningStack, service: Any) -> None:
    quiet, killed = (
        service.create_lora_training_client(base_model=MODEL, rank=4, seed=5).result()
        for _ in range(2)
    )
    expected = looped(stack, quiet)
    sampler = killed.save_weights_and_get_sampling_client().result()
    before = sampler.sample(PROMPT, 1, params(temperature=0.0)).result().sequences[0].tokens
    assert looped(stack, killed, kill_at=STEPS // 2) == expected
    assert certificate(stack, killed.model_id) == certificate(stack, quiet.model_id)
    # What samples is the same too, by the weights that were saved before.
    after = sampler.sample(PROMPT, 1, params(temperature=0.0)).result().sequences[0].tokens
    assert list(before) == list(after)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningStack]:
    """A stack to which a client is gone after two seconds."""
    data_dir = tmp_path_factory.mktemp("hasty") / "data"
    environment = {"SIGNAL_CLIENT_GONE": "2"}
    options = ("--model", f"{MODEL}={tiny_model}", "--devices", "cpu:1x1")
    yield stacks.up(data_dir, *options, env=environment)
    stacks.down(data_dir)


@pytest.mark.long
def test_a_client_that_vanishes_frees_its_device_and_may_come_back(hasty: RunningStack) -> None:
    wire = Wire(hasty)
    model = wire.model()
    first = wire.number(wire.loss(model, 1))
    with Api(hasty) as api:
        run = Run(api, run_id_of(model))
        deadline = time.monotonic() + 60
        while run.get().json()["status"] != "paused":
            assert time.monotonic() < deadline, run.get().text
            time.sleep(0.2)
        assert run.get().json()["hold"]["reason"] == "idle"
    wire.ok("session_heartbeat", session_id=wire.session)
    wire.result(wire.step(model, 2, learning_rate=0.0))
    assert wire.number(wire.loss(model, 3)) == first
    wire.close()


def test_its_runs_are_ordinary_runs(stack: RunningStack) -> None:
    service = service_of(stack)
    model = service.create_lora_training_client(base_model=MODEL, rank=4).result()
    model.forward_backward([plain()], "cross_entropy")
    model.optim_step(STEP).result()
    model.save_state("kept").result()
    with Api(stack) as api:
        session = model.model_id.split(":")[0]
        found = api.get("/runs", params={"label": f"tinker.session={session}"}).json()["data"]
        assert [run["name"] for run in found] == [model.model_id]
        (saved,) = api.get(f"/runs/{found[0]['run_id']}/artifacts").json()["data"]
        assert {file["path"] for file in saved["files"]} >= {"adapter_model.safetensors"}
        branch = api.post(f"/runs/{found[0]['run_id']}/branch", {"at_seq": 2})
        assert branch.status_code == 201, branch.text
        api.post(f"/runs/{branch.json()['run_id']}/cancel")
        service.close("success").result()
        run, deadline = Run(api, found[0]["run_id"]), time.monotonic() + 30
        while run.get().json()["status"] != "completed":
            assert time.monotonic() < deadline, run.get().text
            time.sleep(0.1)
