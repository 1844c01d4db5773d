"""`signal up`, `down`, `status`, `keys` and `doctor` as users type them, on real stacks."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gpu_pool.process import Process
from tests.support import stack as stacks
from tests.support.stack import RunningStack
from web.stack import leftovers, state
from web.stack.folder import Folder

MODULE = "raise SystemExit('the module of the user was taken for ours')\n"


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def post(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        headers = bearer(key) | {"Content-Type": "application/json"}
        connection.request("POST", parts.path, json.dumps(body), headers)
        answer = connection.getresponse()
        read: dict[str, Any] = json.loads(answer.read())
        assert answer.status < 300, read
        return read
    finally:
        connection.close()


def forward(stack: RunningStack, run: str) -> tuple[str, dict[str, Any]]:
    """One forward_backward on a worker; its future and the future's final state."""
    body = {"batch_data": [{"text": "one two three"}]}
    url = f"{stack.base_url}/runs/{run}/forward_backward_async"
    future = post(url, stack.api_key, body)["future_id"]
    for _ in range(4):
        found = read_future(stack, future, wait=25)
        if found["status"] not in ("pending", "running"):
            break
    assert found["status"] == "completed", found
    return future, found


def read_future(stack: RunningStack, future: str, wait: int = 0) -> dict[str, Any]:
    status, body = get(f"{stack.base_url}/futures/{future}?wait={wait}", bearer(stack.api_key))
    assert status in (200, 202)
    found: dict[str, Any] = json.loads(body)
    return found


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder of this test's own; whatever runs on it is ended."""
    folder = tmp_path / "its own data"
    yield folder
    if folder.exists():
        stacks.down(folder)


def test_it_serves_what_it_printed(stack: RunningStack):
    assert get(f"{stack.base_url}/ready")[0] == 200
    status, body = get(f"{stack.base_url}/models", bearer(stack.api_key))
    assert status == 200
    assert json.loads(body)["models"] == ["tiny"]
    assert Process.of(stack.pid) is not None


@pytest.mark.parametrize("page", ["/", "/tasks", "/api/workers", "/metrics", "/healthcheck"])
def test_flower_has_a_login(stack: RunningStack, page: str):
    assert get(stack.flower_url + page)[0] == 401
    assert get(stack.flower_url + page, basic("signal:guess"))[0] == 401
    assert get(stack.flower_url + page, basic(stack.flower_login))[0] == 200


def test_flower_sees_the_workers(stack: RunningStack):
    def seen() -> bool:
        status, body = get(f"{stack.flower_url}/api/workers?refresh=1", basic(stack.flower_login))
        return status == 200 and any(name.startswith("cpu") for name in json.loads(body))

    eventually(seen, 30)


def test_everything_listens_on_loopback_alone(stack: RunningStack):
    inodes = set()
    for process in leftovers.marked(Folder(stack.data_dir)):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except FileNotFoundError:
                continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
    assert len(listening) >= 3
    assert set(listening) == {"0100007F"}


def test_secrets_are_the_owners_and_in_no_argument(stack: RunningStack):
    assert stat.S_IMODE(stack.data_dir.stat().st_mode) == 0o700
    for path in stack.data_dir.rglob("*"):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
    names = ("secret", "api_key", "flower_login", "redis/password")
    secrets = [(stack.data_dir / name).read_text().strip() for name in names]
    for process in leftovers.marked(Folder(stack.data_dir)):
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert not [secret for secret in secrets if secret in arguments]


def test_redis_has_a_password(stack: RunningStack):
    found = state.read(Folder(stack.data_dir))
    assert found is not None
    port = urlsplit(found.environment["REDIS_URL"]).port
    with socket.create_connection(("127.0.0.1", port or 0), timeout=5) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100).startswith(b"-NOAUTH")


def test_a_second_up_prints_the_running_one(stack: RunningStack):
    again = stacks.up(stack.data_dir)
    assert again == stack
    text = stacks.signal("up", "--data-dir", stack.data_dir)
    assert stack.base_url in text


def test_keys_are_for_users(stack: RunningStack):
    first, second = stack.new_user("ada"), stack.new_user("ada")
    assert first != second
    for key in (first, second):
        assert get(f"{stack.base_url}/models", bearer(key))[0] == 200
    assert get(f"{stack.base_url}/models", bearer(first[:-1]))[0] == 401
    plain = stacks.signal("keys", "create", "--user", "bob", "--data-dir", stack.data_dir)
    assert get(f"{stack.base_url}/models", bearer(plain.strip()))[0] == 200
    refused = stacks.attempt("keys", "create", "--user", "no spaces", "--data-dir", stack.data_dir)
    assert refused.returncode == 1
    assert "--user" in refused.stderr


def test_keys_are_listed_and_revoked(stack: RunningStack):
    where = ("--data-dir", stack.data_dir)
    key = stack.new_user("carl")
    key_id = key.split("-")[2]
    assert get(f"{stack.base_url}/models", bearer(key))[0] == 200
    listed = json.loads(stacks.signal("keys", "list", "--json", *where))
    (mine,) = [row for row in listed if row["key_id"] == key_id]
    assert (mine["user"], mine["revoked_at"]) == ("carl", None)
    assert key not in stacks.signal("keys", "list", *where)
    stacks.signal("keys", "revoke", key_id, *where)
    (row,) = [row for row in stacks.signal("keys", "list", *where).splitlines() if key_id in row]
    assert row.endswith("revoked")
    # The web processes remember a key for ten seconds.
    eventually(lambda: get(f"{stack.base_url}/models", bearer(key))[0] == 401)
    unknown = stacks.attempt("keys", "revoke", "nothing", *where)
    assert unknown.returncode == 1
    assert "signal keys list" in unknown.stderr


def test_status(stack: RunningStack):
    run = post(f"{stack.base_url}/runs", stack.api_key, {"base_model": "tiny"})
    found = json.loads(stacks.signal("status", "--json", "--data-dir", stack.data_dir))
    assert found["base_url"] == stack.base_url
    assert {row["name"] for row in found["processes"]} >= {"redis", "web", "agent", "projector"}
    assert all(row["alive"] for row in found["processes"])
    assert [row["name"] for row in found["devices"]] == ["cpu0", "cpu1"]
    (row,) = [row for row in found["runs"] if row["run_id"] == run["run_id"]]
    bound = row["journal"].pop("redis_bytes_bound")
    assert bound > 0
    assert set(row["journal"]) >= {"entries", "last_seq", "applied_seq", "waiting", "unsealed"}
    assert set(row["journal"].values()) == {0}
    assert row["queue"] == {"name": f"run.{run['run_id']}", "length": 0}
    assert run["run_id"] in stacks.signal("status", "--data-dir", stack.data_dir)
    post(f"{stack.base_url}/runs/{run['run_id']}/cancel", stack.api_key, {})


def test_doctor_finds_a_running_stack_in_order(stack: RunningStack):
    found = json.loads(stacks.signal("doctor", "--json", "--data-dir", stack.data_dir))["findings"]
    assert {finding["about"] for finding in found} >= {"python", "torch", "redis", "port", "models"}
    assert not [finding for finding in found if finding["level"] == "error"]


def test_doctor_says_how_to_mend(tmp_path: Path):
    (tmp_path / "models.json").write_text('{"models": [{"name": "gone", "path": "/no/such"}]}')
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o644)
    done = stacks.attempt("doctor", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert "--model gone=FOLDER" in done.stdout
    assert f"chmod 600 '{tmp_path / 'secret'}'" in done.stdout


def test_nothing_runs(tmp_path: Path):
    assert "Nothing runs" in stacks.signal("down", "--data-dir", tmp_path / "none")
    found = stacks.attempt("status", "--json", "--data-dir", tmp_path / "none")
    assert found.returncode == 1
    assert json.loads(found.stdout)["running"] is False


def test_two_stacks_side_by_side_from_a_folder_like_ours(stack, data_dir, tmp_path, tiny_model):
    """The user's own `web/`, `workers/`, `schemas.py`, `celery.py` … are not taken for ours."""
    home = tmp_path / "project"
    for name in ("web", "workers", "gpu_pool", "flower"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text(MODULE)
    for name in ("schemas", "celery", "gunicorn", "redis", "json", "rewardsignal", "click"):
        (home / f"{name}.py").write_text(MODULE)
    (home / "gunicorn.conf.py").write_text(MODULE)
    (home / "flowerconfig.py").write_text(MODULE)
    other = stacks.up(
        data_dir, "--model", f"other={tiny_model}", "--devices", "cpu:1x1",
        cwd=home, env={"FLOWER_PORT": "1", "GUNICORN_CMD_ARGS": "--workers 7"},
    )  # fmt: skip
    assert other.base_url != stack.base_url
    assert other.flower_url != stack.flower_url
    for one, models in ((stack, ["tiny"]), (other, ["other"])):
        body = get(f"{one.base_url}/models", bearer(one.api_key))[1]
        assert json.loads(body)["models"] == models
    assert get(f"{other.base_url}/models", bearer(stack.api_key))[0] == 401
    # Through the agent and its worker too, which are started by what `up` started.
    run = post(f"{other.base_url}/runs", other.api_key, {"base_model": "other"})["run_id"]
    assert forward(other, run)[1]["result"]["num_tokens"] > 0
    assert "Stopped" in stacks.signal("down", "--data-dir", data_dir, cwd=home)
    assert get(f"{stack.base_url}/ready")[0] == 200


def test_state_survives_down_and_up(data_dir, tiny_model):
    first = stacks.up(data_dir, "--model", f"tiny={tiny_model}", "--devices", "cpu:1x1")
    settings = {"base_model": "tiny", "name": "kept"}
    run = post(f"{first.base_url}/runs", first.api_key, settings)["run_id"]
    future, done = forward(first, run)
    stacks.down(data_dir)
    again = stacks.up(data_dir, "--devices", "cpu:1x1")
    assert again.api_key == first.api_key
    status, body = get(f"{again.base_url}/runs/{run}", bearer(first.api_key))
    assert (status, json.loads(body)["name"]) == (200, "kept")
    assert read_future(again, future)["result"] == done["result"]
    files = json.loads(get(f"{again.base_url}/models", bearer(first.api_key))[1])
    assert files["models"] == ["tiny"]


def test_a_crashed_process_comes_back_and_a_killed_supervisor_leaves_nothing(data_dir):
    running = stacks.up(data_dir, "--devices", "cpu:1x1")
    folder = Folder(data_dir)
    before = state.read(folder)
    assert before is not None
    before.processes["web"].signal(signal.SIGKILL)

    def is_back() -> bool:
        now = state.read(folder)
        return now is not None and now.restarts["web"] == 1

    eventually(is_back)
    # The supervisor holds the listening socket, so that this waits where it could be refused.
    assert get(f"{running.base_url}/ready")[0] == 200
    before.processes["agent"].signal(signal.SIGKILL)
    before.supervisor.signal(signal.SIGKILL)
    eventually(lambda: not before.supervisor.alive())
    found = json.loads(stacks.signal("status", "--json", "--data-dir", data_dir))
    assert (found["running"], found["supervised"]) == (True, False)
    assert leftovers.marked(folder)
    stacks.down(data_dir)


def test_the_next_up_adopts_what_a_killed_supervisor_left_and_mends_it(data_dir, tiny_model):
    options = ("--model", f"tiny={tiny_model}", "--devices", "cpu:1x1")
    first = stacks.up(data_dir, *options)
    folder = Folder(data_dir)
    run = post(f"{first.base_url}/runs", first.api_key, {"base_model": "tiny"})["run_id"]
    before = state.read(folder)
    assert before is not None
    before.supervisor.signal(signal.SIGKILL)
    eventually(lambda: not before.supervisor.alive())
    # It serves without a supervisor, and loses one process meanwhile.
    assert get(f"{first.base_url}/runs/{run}", bearer(first.api_key))[0] == 200
    before.processes["projector"].signal(signal.SIGKILL)
    eventually(lambda: not before.processes["projector"].alive())
    again = stacks.up(data_dir, *options)
    after = state.read(folder)
    assert after is not None
    assert (again.base_url, again.flower_url) == (first.base_url, first.flower_url)
    assert after.supervisor != before.supervisor
    for name in ("redis", "web", "agent", "flower"):
        assert after.processes[name] == before.processes[name]
    assert after.processes["projector"] != before.processes["projector"]
    # What was adopted is mended like any other, web on a new socket at the old address.
    after.processes["web"].signal(signal.SIGKILL)

    def is_back() -> bool:
        now = state.read(folder)
        return now is not None and now.restarts["web"] == 1

    eventually(is_back)
    eventually(lambda: get(f"{first.base_url}/ready")[0] == 200)
    assert get(f"{first.base_url}/runs/{run}", bearer(first.api_key))[0] == 200
    stacks.down(data_dir)
    assert leftovers.marked(folder) == []


def test_an_up_with_other_options_ends_what_was_left(data_dir):
    first = stacks.up(data_dir, "--devices", "cpu:1x1")
    before = state.read(Folder(data_dir))
    assert before is not None
    before.supervisor.signal(signal.SIGKILL)
    eventually(lambda: not before.supervisor.alive())
    again = stacks.up(data_dir, "--devices", "cpu:2x1")
    assert again.api_key == first.api_key
    assert not any(process.alive() for process in before.processes.values())
    stacks.down(data_dir)


def test_ctrl_c_stops_all_while_a_long_poll_waits(data_dir, tiny_model):
    command = [stacks.SIGNAL, "up", "--port", "0", "--json", "--data-dir", str(data_dir)]
    command += ["--model", f"tiny={tiny_model}", "--devices", "cpu:1x1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        facts = json.loads(up.stdout.readline())
        assert facts["pid"] == up.pid
        url, key = facts["base_url"], facts["api_key"]
        run = post(f"{url}/runs", key, {"base_model": "tiny"})["run_id"]
        parts = urlsplit(url)
        poll = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        poll.request("GET", f"/runs/{run}/operations?wait=25", headers=bearer(key))
        time.sleep(0.3)
        up.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert up.wait(20) == 0
        assert time.monotonic() - started < 15
        poll.close()
    assert leftovers.marked(Folder(data_dir)) == []


def test_a_taken_port_is_named_with_the_option(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stacks.attempt("up", "--detach", "--port", port, "--data-dir", tmp_path / "d")
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    assert "--port 0" in done.stderr
    assert leftovers.marked(Folder(tmp_path / "d")) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "tiny"], "--model takes NAME=PATH"),
        (["--model", "tiny=/no/such/folder"], "--model tiny=/no/such/folder"),
        (["--model", "../tiny=owner/model"], "cannot name a model"),
        (["--model", "tiny=owner/model"], "SIGNAL_ALLOW_HUB"),
        (["--devices", "cpu:0"], "--devices"),
        (["--host", "no such host"], "--host"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_left(tmp_path, options, words):
    folder = tmp_path / "d"
    done = stacks.attempt("up", "--detach", "--port", 0, "--data-dir", folder, *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert leftovers.marked(Folder(folder)) == []


def test_a_redis_url_is_used_and_not_shared_by_two_data_folders(stack, data_dir, tmp_path):
    """The server of the running stack stands for the operator's own."""
    found = state.read(Folder(stack.data_dir))
    assert found is not None
    taken, free = (found.environment["REDIS_URL"][:-1] + number for number in "01")
    refused = stacks.attempt("up", "--detach", "--data-dir", data_dir, env={"REDIS_URL": taken})
    assert refused.returncode == 1
    assert "another data folder" in refused.stderr
    other = stacks.up(data_dir, "--devices", "cpu:1x1", env={"REDIS_URL": free})
    recorded = state.read(Folder(data_dir))
    assert recorded is not None
    assert "redis" not in recorded.processes
    assert get(f"{other.base_url}/ready")[0] == 200
    dead = stacks.attempt(
        "up", "--detach", "--data-dir", tmp_path / "x", env={"REDIS_URL": "redis://127.0.0.1:1/0"}
    )
    assert dead.returncode == 1
    assert "no server answers at 127.0.0.1:1" in dead.stderr
