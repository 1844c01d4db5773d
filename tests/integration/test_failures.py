"""What dies is replaced, what was asked is done or ends typed: kill -9, a full disk, a broken model.

One stack with one slot, whose tests break it one after the other; each begins when it serves again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rewardsignal as rs
from gpu_pool.process import Process
from tests.support import stack as stacks
from tests.support.api import Api, Run, error_of
from tests.support.disk import filled, small_disk
from tests.support.inside import Inside, until
from tests.support.plan import PLAN, ROWS, STEPS, ended, futures, numbers, run_plan, same
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

BATCH = {"batch_data": ROWS[:2]}
FB: dict[str, Any] = {"kind": "forward_backward", **BATCH}


@dataclass(frozen=True)
class Broken:
    """The stack that this module breaks."""

    stack: RunningStack
    api: Api
    inside: Inside
    on_small_disk: bool
    model: Path

    def works(self) -> None:
        """A new run gets the slot and trains."""
        with self.api.run() as run:
            run.ok("/forward_backward", BATCH)
            assert run.ok("/optim_step")["step"] == 1


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Broken]:
    folder = tmp_path_factory.mktemp("failures")
    model = make_tiny_model(folder / "fragile")
    data_dir = folder / "data"
    options = ("--model", f"tiny={tiny_model}", "--model", f"fragile={model}")
    with small_disk(data_dir, megabytes=64) as on_small_disk:
        try:
            stack = stacks.up(data_dir, *options, "--devices", "cpu:1x1")
            with Inside(stack) as inside:
                api = Api(stack)
                yield Broken(stack, api, inside, on_small_disk, model)
                api.http.close()
        finally:
            stacks.down(data_dir)


@pytest.fixture(scope="module")
def undisturbed(broken: Broken) -> list[dict[str, Any]]:
    """The numbers of the plan when nothing dies."""
    return run_plan(broken.api)


def await_failed(run: Run, code: str) -> dict[str, Any]:
    """The error of a run that fails."""
    found = until(lambda: (state := run.get().json())["status"] == "failed" and state)
    assert isinstance(found, dict)
    assert found["error"]["code"] == code, found
    return dict(found["error"])


def alive(pids: Iterable[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    found = [Process.of(pid) for pid in pids]
    return [process.pid for process in found if process is not None and process.alive()]


@contextmanager
def a_pipelined_loop(
    broken: Broken, undisturbed: list[dict[str, Any]]
) -> Iterator[Callable[[int], None]]:
    """Runs the plan by the SDK from a thread; its numbers must be those of a run that nobody disturbs.

    Gives a function that returns when so many operations have been submitted.
    """
    submitted: list[Any] = []
    with (
        rs.SignalClient(broken.stack.api_key, broken.stack.base_url) as client,
        broken.api.run() as run,
    ):
        sdk = client.run(run.id)

        def loop() -> None:
            for operation in PLAN:
                submitted.extend(sdk.submit([operation]))
                time.sleep(0.02)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield lambda count: until(lambda: len(submitted) >= count or None) and None
        finally:
            thread.join()
        results = rs.wait_all(submitted, timeout=60)
        same([numbers({"status": "completed", "result": one}) for one in results], undisturbed)
        assert run.get("/session_state").json()["current_step"] == STEPS
        assert run.get("/operations").json()["next_seq"] == len(PLAN)


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_killed_worker_is_not_noticed(
    broken: Broken, undisturbed: list[dict[str, Any]], victim: str
) -> None:
    with a_pipelined_loop(broken, undisturbed) as await_submitted:
        await_submitted(8)
        (run_id,) = broken.api.get("/runs", params={"status": "ready"}).json()["data"]
        pids = broken.inside.worker_pids(run_id["run_id"])
        os.kill(pids[victim == "child"], signal.SIGKILL)
    until(lambda: not alive(pids), 5)
    broken.works()


@contextmanager
def unsupervised(broken: Broken) -> Iterator[None]:
    """What dies stays dead for a while."""
    os.kill(broken.stack.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broken.stack.pid, signal.SIGCONT)


def test_a_killed_redis_is_answered_503_and_loses_nothing(
    broken: Broken, undisturbed: list[dict[str, Any]]
) -> None:
    api = broken.api
    with a_pipelined_loop(broken, undisturbed) as await_submitted:
        await_submitted(8)
        with api_run_of_another_kind(broken) as (run_id, future), unsupervised(broken):
            broken.inside.service("redis").signal(signal.SIGKILL)
            for answer in (
                lambda: api.post(f"/runs/{run_id}/forward_backward", BATCH),
                lambda: api.post(f"/runs/{run_id}/forward_backward_async", BATCH),
                lambda: api.post(f"/runs/{run_id}/operations", {"operations": [FB]}),
                lambda: api.post(f"/runs/{run_id}/cancel"),
                lambda: api.get(f"/runs/{run_id}/operations", params={"wait": 20}),
                lambda: api.get(f"/futures/{future}", params={"wait": 20}),
                lambda: api.get("/futures", params={"ids": future, "wait": 20}),
                lambda: api.delete(f"/futures/{future}"),
                lambda: api.post("/runs", {"base_model": "tiny"}),
            ):
                began = time.monotonic()
                found = answer()
                assert time.monotonic() - began < 12
                error = error_of(found, 503, "unavailable")
                assert error["retryable"] and int(found.headers["Retry-After"]) >= 1
            assert api.get("/health").status_code == 200
            assert api.get("/ready").status_code == 503
    assert api.get(f"/futures/{future}").json()["status"] == "cancelled"
    assert broken.inside.redis.ping()


@contextmanager
def api_run_of_another_kind(broken: Broken) -> Iterator[tuple[str, str]]:
    """A run that waits for the slot, with a queued operation; cancelled at the end."""
    run = Run(broken.api, broken.api.create())
    (future,) = futures(run, [FB])
    yield run.id, future
    until(lambda: run.post("/cancel").status_code == 200)


@pytest.mark.parametrize("victim", ["worker", "master", "both"])
def test_a_killed_web_process_is_not_noticed(
    broken: Broken, undisturbed: list[dict[str, Any]], victim: str
) -> None:
    with a_pipelined_loop(broken, undisturbed) as await_submitted:
        await_submitted(8)
        master = broken.inside.service("web")
        children = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
        assert children
        if victim != "master":
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)
        if victim != "worker":
            master.signal(signal.SIGKILL)
            broken.inside.await_restart(master, "web")
    assert broken.api.get("/ready").status_code == 200


def test_a_killed_agent_ends_no_worker_and_a_killed_projector_loses_nothing(broken: Broken) -> None:
    agent, projector = broken.inside.service("agent"), broken.inside.service("projector")
    with broken.api.run() as run:
        pids = broken.inside.worker_pids(run.id)
        run.ok("/forward_backward", BATCH)
        projector.signal(signal.SIGKILL)
        run.ok("/optim_step")
        run.ok("/save_state", {"name": "kept"})
        open_ones = futures(run, [FB, FB, {"kind": "optim_step"}])
        agent.signal(signal.SIGKILL)
        found = ended(broken.api, open_ones)
        assert {one["status"] for one in found} == {"completed"}
        broken.inside.await_restart(agent, "agent")
        broken.inside.await_restart(projector, "projector")
        assert run.ok("/forward_backward", BATCH)["seq"] == 7
        assert broken.inside.worker_pids(run.id) == pids
        assert alive(pids) == list(pids)
        until(lambda: [one["name"] for one in run.get("/artifacts").json()["data"]] == ["kept"])
        rows = run.get("/metrics").json()["metrics"]
        assert [row["seq"] for row in rows][:2] == [1, 2]
    broken.works()


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 50_000)


def empty(model: Path) -> None:
    (model / "model.safetensors").unlink()


def misfit(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def vanish(model: Path) -> None:
    shutil.rmtree(model)


@pytest.mark.parametrize("damage", [truncate, empty, misfit, vanish])
def test_a_model_damaged_after_up_fails_its_run_with_the_reason(
    broken: Broken, damage: Callable[[Path], None]
) -> None:
    api, model = broken.api, make_tiny_model(broken.model)
    with api.run() as before:
        # Admitted while the files are whole; the slot becomes free when they are not.
        run = Run(api, api.create(base_model="fragile"))
        (future,) = futures(run, [FB])
        damage(model)
        before.post("/cancel")
        state = until(lambda: (now := run.get().json())["status"] in ("ready", "failed") and now)
    run.post("/cancel")
    assert isinstance(state, dict) and state["status"] == "failed"
    code, message = state["error"]["code"], state["error"]["message"]
    assert code == "model_load_failed"
    assert "fragile" in message
    assert ended(api, [future])[0]["error"]["code"] == code
    if damage is vanish:
        refused = api.post("/runs", {"base_model": "fragile"})
        assert error_of(refused, 424, "model_load_failed")["param"] == "base_model"
    broken.works()


def test_a_model_is_usable_again_once_it_is_mended(broken: Broken) -> None:
    make_tiny_model(broken.model)
    with broken.api.run(base_model="fragile") as run:
        run.ok("/forward_backward", BATCH)


def test_a_full_disk_fails_save_state_and_nothing_else(broken: Broken) -> None:
    if not broken.on_small_disk:
        pytest.skip("the right to mount a small file system, to fill it")
    data_dir = broken.stack.data_dir
    with broken.api.run(lora_r=256) as run:
        run.ok("/forward_backward", BATCH)
        with filled(data_dir, leave=1_000_000):
            (future,) = futures(run, [{"kind": "save_state", "name": "mine"}])
            (found,) = ended(broken.api, [future])
            assert (found["status"], found["error"]["code"]) == ("failed", "storage_full")
            refused = run.post("/save_state", {"name": "mine"})
            assert error_of(refused, 503, "storage_full")["retryable"]
            assert int(refused.headers["Retry-After"]) >= 1
            assert run.ok("/optim_step")["step"] == 1
        aside = data_dir / "store" / ".aside"
        assert not [path for path in aside.rglob("*.*") if path.is_file()]
        saved = run.ok("/save_state", {"name": "mine"})
        assert saved["size_bytes"] > 2_000_000
        assert len(run.get("/artifacts").json()["data"]) == 1


def test_the_sdk_raises_what_a_full_disk_did_at_once(broken: Broken) -> None:
    if not broken.on_small_disk:
        pytest.skip("the right to mount a small file system, to fill it")
    with (
        rs.SignalClient(broken.stack.api_key, broken.stack.base_url) as client,
        broken.api.run(lora_r=256) as run,
        filled(broken.stack.data_dir, leave=1_000_000),
    ):
        began = time.monotonic()
        with pytest.raises(rs.OperationFailedError) as caught:
            client.run(run.id).save_state("mine")
        assert caught.value.code == "storage_full"
        # The operation has ended: only another one can succeed.
        assert time.monotonic() - began < 5


def test_a_disk_without_any_room_is_answered_503_and_hangs_nothing(broken: Broken) -> None:
    if not broken.on_small_disk:
        pytest.skip("the right to mount a small file system, to fill it")
    with broken.api.run() as run:
        accepted: list[str] = []
        with filled(broken.stack.data_dir, leave=0):

            def refused() -> Any:
                answer = run.post("/forward_backward_async", BATCH)
                if answer.status_code == 202:
                    accepted.append(answer.json()["future_id"])
                    return None
                return answer

            answer = until(refused, 10)
            error_of(answer, 503, "storage_full")
            assert int(answer.headers["Retry-After"]) >= 1
            assert run.get().status_code == 200
        # Redis may have refused the worker's own writes meanwhile: they were repeated.
        found = ended(broken.api, accepted)
        assert all(one["status"] == "completed" for one in found), found
    broken.works()


def test_everything_survives_down_and_up(broken: Broken, undisturbed: list[dict[str, Any]]) -> None:
    """The last test: the stack comes back at another address."""
    stack, key = broken.stack, broken.stack.new_user("survivor")
    api = Api(stack, key)
    with api.run(name="kept") as run:
        ids = futures(run, PLAN)
        ended(api, ids)
        saved = run.ok("/save_state", {"name": "mine"})
        run.ok("/complete", {"save": False})
    left = Run(api, api.create(name="left open"))
    left.wait_ready()
    headers = {"Idempotency-Key": "once"}
    first = left.post("/forward_backward", BATCH, headers=headers).json()
    waiting = Run(api, api.create(name="without a slot"))
    (waits,) = futures(waiting, [FB])
    shown = {path: run.get(path).json() for path in ("", "/metrics", "/artifacts", "/operations")}
    api.http.close()
    stacks.down(stack.data_dir)
    again = stacks.up(stack.data_dir, "--devices", "cpu:1x1")
    assert (again.api_key, again.data_dir) == (stack.api_key, stack.data_dir)
    api = Api(again, key)
    try:
        run, left = Run(api, run.id), Run(api, left.id)
        for path, body in shown.items():
            assert run.get(path).json() == body
        same([numbers(one) for one in ended(api, ids)], undisturbed)
        for file in saved["manifest"]["files"]:
            content = run.get(f"/artifacts/mine/files/{file['path']}").content
            assert len(content) == file["size_bytes"]
        assert json.loads(run.get("/artifacts/mine/files/adapter_config.json").content)["r"] == 4
        # The session was in the memory of a worker, and is in another's now.
        assert left.post("/forward_backward", BATCH, headers=headers).json() == first
        assert left.ok("/optim_step")["seq"] == 2
        left.ok("/complete", {"save": False})
        # One that still waited for its turn gets it.
        waiting = Run(api, waiting.id)
        assert ended(api, [waits])[0]["status"] == "completed"
        assert waiting.ok("/optim_step")["step"] == 1
    finally:
        api.http.close()
