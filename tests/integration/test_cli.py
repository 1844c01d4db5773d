"""Each command of `signal` against a real stack, as a person and as a script use it."""

from __future__ import annotations

import json
import os
import shlex
import signal as signals
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rewardsignal as rs
from rewardsignal._config import Profile
from tests.support import stack as stacks
from tests.support.stack import RunningStack
from tests.support.terminal import CTRL_C, CTRL_D, ENTER, Terminal

BATCH: list[dict[str, Any]] = [{"text": "The quick brown fox."}]
CHAT = [
    {"role": "user", "content": "Once upon"},
    {"role": "assistant", "content": "a time a small model learned to count."},
]
ESCAPE = "\x1b"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of the profile file; empty."""
    return tmp_path / "config"


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.api_key, stack.base_url) as found:
        yield found


@pytest.fixture(scope="module")
def env(stack: RunningStack) -> dict[str, str]:
    """Names the stack and its key."""
    return {"SIGNAL_BASE_URL": stack.base_url, "SIGNAL_API_KEY": stack.api_key}


@pytest.fixture(scope="module")
def run(client: rs.SignalClient) -> Iterator[rs.SignalRun]:
    """A run with two steps and a checkpoint, for the tests that leave it so."""
    found = client.create_run("tiny", name="cli", labels={"suite": "cli"}, lora_r=4, seed=1)
    for _ in range(2):
        found.forward_backward(BATCH)
        found.optim_step()
    found.save_state("mine")
    yield found
    found.cancel()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps({'messages': CHAT})}\n" for _ in range(6)))
    return path


Signal = Callable[..., str]


@pytest.fixture
def signal(env: dict[str, str]) -> Signal:
    """Runs a command that must do well; what it printed."""

    def command(*arguments: object, text: str = "") -> str:
        done = stacks.attempt(*arguments, env=env, text=text)
        assert done.returncode == 0, done.stderr
        assert ESCAPE not in done.stdout + done.stderr
        assert "\r" not in done.stdout + done.stderr
        return done.stdout

    return command


def terminal(env: dict[str, str], cwd: Path, *arguments: object, columns: int = 100) -> Terminal:
    """`signal …` in a terminal."""
    command = [stacks.SIGNAL, *map(str, arguments)]
    return Terminal(command, stacks.environment() | env, cwd, columns)


# Which server, and as whom.


def test_up_writes_the_profile_that_the_sdk_reads(
    stack: RunningStack, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stacks.signal("up", "--data-dir", stack.data_dir, env={"SIGNAL_CONFIG_DIR": str(home)})
    assert "Profile  local" in told
    monkeypatch.setenv("SIGNAL_CONFIG_DIR", str(home))
    for name in ("SIGNAL_API_KEY", "SIGNAL_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with rs.SignalClient() as found:
        assert found.base_url == stack.base_url
        assert [model.name for model in found.models()] == ["tiny"]
    shown = json.loads(stacks.signal("whoami", "--json", env={"SIGNAL_CONFIG_DIR": str(home)}))
    assert (shown["name"], shown["key_from"]) == ("local", "the profile local")


def test_up_can_leave_the_profile_alone(stack: RunningStack, home: Path) -> None:
    own = {"SIGNAL_CONFIG_DIR": str(home)}
    told = stacks.signal("up", "--no-profile", "--data-dir", stack.data_dir, env=own)
    assert "Profile" not in told
    assert not home.exists()


def test_login_whoami_use_logout(stack: RunningStack, home: Path) -> None:
    own = {"SIGNAL_CONFIG_DIR": str(home)}
    key = stack.new_user("cli-ann")
    wrong = stacks.attempt(
        "login", "--with-token", "--base-url", stack.base_url, env=own, text="sk-signal-wrong"
    )
    assert (wrong.returncode, home.exists()) == (3, False)
    told = stacks.signal(
        "login", "--with-token", "--base-url", stack.base_url, env=own, text=f"{key}\n"
    )
    assert "as cli-ann" in told
    stacks.signal("up", "--data-dir", stack.data_dir, env=own)
    assert "cli-ann" in stacks.signal("whoami", env=own)
    assert stack.base_url in stacks.signal("use", "local", env=own)
    assert "cli-ann" not in stacks.signal("whoami", env=own)
    stacks.signal("logout", env=own)
    nobody = stacks.attempt("whoami", env=own)
    assert nobody.returncode == 3
    assert "signal login" in nobody.stderr


def test_login_at_a_terminal_does_not_show_the_key(
    stack: RunningStack, home: Path, tmp_path: Path
) -> None:
    own = {"SIGNAL_CONFIG_DIR": str(home)}
    with terminal(own, tmp_path, "login") as screen:
        screen.expect("Server [http://127.0.0.1:8000]: ")
        screen.type(stack.base_url + ENTER)
        screen.expect("API key: ")
        screen.type(stack.api_key + ENTER)
        screen.expect("Logged in to ")
        assert screen.end() == 0
        assert stack.api_key not in screen.shown
    stored = json.loads((home / "profiles.json").read_text())["profiles"]["default"]
    assert Profile(**stored) == Profile(stack.base_url, stack.api_key)


# Runs.


def test_models(signal: Signal) -> None:
    assert "tiny" in signal("models")
    assert json.loads(signal("models", "--json"))[0]["name"] == "tiny"


def test_list_and_show(signal: Signal, run: rs.SignalRun) -> None:
    assert run.run_id in signal("runs", "list")
    found = json.loads(signal("runs", "list", "--label", "suite=cli", "--json"))
    assert [one["run_id"] for one in found] == [run.run_id]
    assert "checkpoint mine" in signal("runs", "show", run.run_id)
    assert json.loads(signal("runs", "show", run.run_id, "--json"))["current_step"] == 2


def test_a_table_is_cut_to_the_terminal(
    env: dict[str, str], run: rs.SignalRun, tmp_path: Path
) -> None:
    with terminal(env, tmp_path, "runs", "list", columns=50) as screen:
        assert screen.end() == 0
    assert f"{ESCAPE}[1m" in screen.shown
    lines = screen.shown.replace(f"{ESCAPE}[1m", "").replace(f"{ESCAPE}[0m", "").splitlines()
    assert any(line.startswith(run.run_id) for line in lines)
    assert max(map(len, lines)) <= 50
    with terminal(env | {"NO_COLOR": "1"}, tmp_path, "runs", "list") as plain:
        assert plain.end() == 0
    assert ESCAPE not in plain.shown


def test_watch_and_logs(signal: Signal, client: rs.SignalClient) -> None:
    run = client.create_run("tiny", lora_r=4)
    run.forward_backward(BATCH)
    run.optim_step()
    lines = signal("runs", "logs", run.run_id).splitlines()
    assert [line.split()[3] for line in lines if " loss " in line] == ["forward_backward"]
    run.complete()
    assert "closed" in signal("runs", "watch", run.run_id)
    found = [json.loads(line) for line in signal("runs", "logs", run.run_id, "--json").splitlines()]
    operations = [one["operation"] for one in found if "operation" in one]
    assert [one["kind"] for one in operations] == ["forward_backward", "optim_step", "complete"]
    assert operations[0]["metrics"]["loss"] > 0


def test_logs_are_followed_to_the_end_of_the_run(
    env: dict[str, str], client: rs.SignalClient
) -> None:
    run = client.create_run("tiny", lora_r=4)
    losses = [run.forward_backward(BATCH).loss]
    command = [stacks.SIGNAL, "runs", "logs", run.run_id, "-f", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=stacks.environment() | env
    ) as logs:
        assert logs.stdout is not None
        found = [json.loads(logs.stdout.readline()) for _ in range(2)]
        losses.append(run.forward_backward(BATCH).loss)
        run.complete(save=False)
        found += [json.loads(line) for line in logs.stdout]
        assert logs.wait(30) == 0
    done = [one["operation"] for one in found if "operation" in one]
    assert [one["metrics"]["loss"] for one in done[:2]] == losses
    assert done[-1]["kind"] == "complete"
    assert "closed" in [one["event"]["type"] for one in found if "event" in one]


def test_pause_resume_branch_certificate(
    signal: Signal, env: dict[str, str], client: rs.SignalClient
) -> None:
    run = client.create_run("tiny", lora_r=4)
    run.forward_backward(BATCH)
    run.optim_step()
    assert "paus" in signal("runs", "pause", run.run_id)
    refused = stacks.attempt("sample", run.run_id, "x", env=env)
    assert refused.returncode == 5
    assert "signal runs resume" in refused.stderr
    assert run.run_id in signal("runs", "resume", run.run_id)
    fork = client.run(signal("runs", "branch", run.run_id, "--name", "fork").strip())
    assert fork.info.parent is not None
    hashes = [
        json.loads(signal("runs", "certificate", one.run_id, "--json")) for one in (run, fork)
    ]
    assert hashes[0]["weights"] == hashes[1]["weights"]
    assert hashes[0]["weights"] in signal("runs", "certificate", run.run_id)
    for one in (run, fork):
        assert "cancelled" in signal("runs", "cancel", one.run_id, "--yes")


def test_delete_asks_on_a_terminal(
    env: dict[str, str], client: rs.SignalClient, tmp_path: Path
) -> None:
    run = client.create_run("tiny", name="short", lora_r=4)
    assert stacks.attempt("runs", "delete", run.run_id, env=env).returncode == 2
    with terminal(env, tmp_path, "runs", "delete", run.run_id) as screen:
        screen.expect("(short, ")
        screen.expect("[y/N]: ")
        screen.type("n" + ENTER)
        assert screen.end() == 130
    assert run.status().run_id == run.run_id
    with terminal(env, tmp_path, "runs", "delete", run.run_id) as screen:
        screen.expect("[y/N]: ")
        screen.type("y" + ENTER)
        screen.expect("deleted")
        assert screen.end() == 0
    with pytest.raises(rs.NotFoundError):
        run.status()


def test_checkpoints(signal: Signal, run: rs.SignalRun, tmp_path: Path) -> None:
    assert signal("checkpoints", "list", run.run_id).splitlines()[1].startswith("mine")
    folder = tmp_path / "adapter"
    told = json.loads(signal("checkpoints", "download", run.run_id, "mine", folder, "--json"))
    assert sorted(told["files"]) == sorted(path.name for path in folder.iterdir())
    assert "adapter_config.json" in told["files"]


# Training.


def losses_of(lines: str) -> list[float]:
    return [row["loss"] for row in map(json.loads, lines.splitlines()) if "loss" in row]


def test_sft_goes_on_after_ctrl_c_as_if_there_had_been_none(
    signal: Signal, env: dict[str, str], client: rs.SignalClient, chats: Path, tmp_path: Path
) -> None:
    options = ("--batch-size", 4, "--learning-rate", 1e-2, "--seed", 3, "--json")
    whole = losses_of(signal("train", "sft", chats, "--model", "tiny", "--steps", 40, *options))
    assert len(whole) == 40
    assert whole[-1] < whole[0] / 2
    command = [stacks.SIGNAL, "train", "sft", chats, "--model", "tiny", "--steps", "40", *options]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=stacks.environment() | env,
    ) as training:  # fmt: skip
        assert training.stdout is not None
        assert training.stderr is not None
        first = [training.stdout.readline() for _ in range(3)]
        training.send_signal(signals.SIGINT)
        rest, told = training.communicate(timeout=60)
    assert training.returncode == 130
    run_id = json.loads(first[0])["run_id"]
    assert f"--resume {run_id}" in told
    seen = losses_of("".join(first) + rest)
    assert seen == whole[: len(seen)]
    assert client.run(run_id).info.status in ("paused", "pausing")
    folder = tmp_path / "adapter"
    after = losses_of(
        signal("train", "sft", chats, "--resume", run_id, "--json", "--output", folder)
    )
    assert after == whole[-len(after) :]
    assert 0 < len(after) <= 40 - len(seen)
    assert folder.joinpath("adapter_config.json").is_file()
    assert client.run(run_id).info.status == "completed"
    again = stacks.attempt("train", "sft", chats, "--resume", run_id, env=env)
    assert again.returncode == 2
    assert "has ended" in again.stderr


def test_sft_at_a_terminal(env: dict[str, str], chats: Path, tmp_path: Path) -> None:
    with terminal(
        env, tmp_path, "train", "sft", chats, "--model", "tiny", "--steps", 400
    ) as screen:
        run_id = screen.expect(" on tiny").split()[1]
        screen.expect("/400, loss ")
        screen.type(CTRL_C)
        screen.expect(f"--resume {run_id}")
        assert screen.end() == 130
    with terminal(
        env, tmp_path, "train", "sft", chats, "--steps", 1, "--resume", run_id, "--save", "short"
    ) as screen:
        screen.expect(f"Saved short in {run_id}")
        assert screen.end() == 0


def test_dpo(signal: Signal, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "Say so.", "chosen": "yes yes", "rejected": "no no"}
    data.write_text(f"{json.dumps(row)}\n" * 4)
    options = ("--model", "tiny", "--steps", 5, "--learning-rate", 1e-2, "--beta", 0.5)
    lines = signal("train", "dpo", data, *options).splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[:5]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] / 2
    assert lines[5].startswith("Saved final in run_")


def test_grpo_learns_a_reward_of_one_s_own(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def share(text, row):\n    return text.count('e') / 8\n")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1=", "answer": {n + 1}}}\n' for n in range(4)))
    arguments = ["train", "grpo", data, "--model", "tiny", "--steps", 15, "--batch-size", 4,
                 "--learning-rate", 2e-2, "--max-tokens", 8, "--reward", "own:share",
                 "--json"]  # fmt: skip
    done = stacks.attempt(*arguments, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rewards = [row["reward"] for row in map(json.loads, done.stdout.splitlines()[:-1])]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


# Samples.


def test_sample(signal: Signal, run: rs.SignalRun) -> None:
    options = ("--max-tokens", 8, "--seed", 5)
    found = json.loads(signal("sample", run.run_id, "Once", "--json", *options))
    text = found["samples"][0][0]["text"]
    assert signal("sample", run.run_id, "Once", *options) == f"{text}\n"
    assert signal("sample", run.run_id, "-", *options, text="Once") == f"{text}\n"
    base = json.loads(
        signal("sample", run.run_id, "Hi", "--chat", "--weights", "base", "--json", *options)
    )
    assert base["weights"]["source"] == "base"
    assert "--- 2 of 2" in signal("sample", run.run_id, "Once", "--n", 2, *options)


def test_a_sample_is_shown_as_it_is_made_and_ctrl_c_cancels_it(
    env: dict[str, str], run: rs.SignalRun, tmp_path: Path
) -> None:
    arguments = ("sample", run.run_id, "Once", "--max-tokens", 1900, "--temperature", 1)
    with terminal(env, tmp_path, *arguments) as screen:
        screen.grow(20)
        screen.type(CTRL_C)
        assert screen.end() == 130
    assert run.sample("a", max_tokens=1).samples


def test_an_ended_run_is_sampled_from_its_checkpoint(
    signal: Signal, client: rs.SignalClient
) -> None:
    run = client.create_run("tiny", lora_r=4)
    run.forward_backward(BATCH)
    run.optim_step(learning_rate=1e-2)
    wanted = run.sample("Once", max_tokens=6, temperature=0.0).samples[0][0].text
    run.complete()
    options = ("--max-tokens", 6, "--temperature", 0)
    assert signal("sample", run.run_id, "Once", *options) == f"{wanted}\n"
    assert list(client.list_runs(label="signal.sample-from")) == []


def test_chat(signal: Signal, env: dict[str, str], run: rs.SignalRun, tmp_path: Path) -> None:
    said = signal("chat", run.run_id, "--max-tokens", 4, "--json", text="Hello\nAnd?\n")
    answers = [json.loads(line) for line in said.splitlines()]
    assert [one["role"] for one in answers] == ["assistant", "assistant"]
    arguments = ("chat", run.run_id, "--max-tokens", 1500, "--temperature", 1)
    with terminal(env, tmp_path, *arguments) as screen:
        screen.expect("leaves, Ctrl-C stops an answer.")
        screen.expect("> ")
        screen.type("Hello" + ENTER)
        screen.expect("Hello\r\n")
        screen.grow(10)
        screen.type(CTRL_C)
        screen.expect("\n> ")
        # At the prompt, Ctrl-C gives up what was typed.
        screen.type("half")
        screen.expect("half")
        screen.press_until(CTRL_C, "\n> ")
        screen.type(CTRL_D)
        assert screen.end() == 0


# How a command ends.


@pytest.mark.parametrize(
    ("arguments", "change", "code"),
    [
        (["runs", "show", "run_unknown"], {}, 4),
        (["runs", "show"], {}, 2),
        (["models"], {"SIGNAL_API_KEY": "sk-signal-wrong"}, 3),
        (["models"], {"SIGNAL_BASE_URL": "http://127.0.0.1:9"}, 5),
        (["runs", "list", "--status", "nonsense"], {}, 1),
    ],
)
def test_exit_codes(
    env: dict[str, str], arguments: list[str], change: dict[str, str], code: int
) -> None:
    done = stacks.attempt(*arguments, env=env | change)
    assert done.returncode == code
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_ends_the_command_quietly(
    env: dict[str, str], run: rs.SignalRun
) -> None:
    command = [stacks.SIGNAL, "runs", "logs", run.run_id, "-f"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=stacks.environment() | env
    ) as logs:
        assert logs.stdout is not None
        assert logs.stderr is not None
        logs.stdout.readline()
        logs.stdout.close()
        run.forward_backward(BATCH)
        assert logs.wait(30) == 141
        assert logs.stderr.read() == b""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(signal: Signal, shell: str) -> None:
    assert "_SIGNAL_COMPLETE" in signal("completion", shell)


def test_bash_completes_run_ids(env: dict[str, str], run: rs.SignalRun) -> None:
    script = (
        f'eval "$({shlex.quote(stacks.SIGNAL)} completion bash)"; COMP_WORDS=(signal runs show run_); '
        'COMP_CWORD=3; _signal_completion signal; echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(stacks.SIGNAL).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "-c", script], env=stacks.environment() | env | {"PATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.run_id in found.stdout.split()
    nowhere = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True,
        env=stacks.environment() | env | {"PATH": path, "SIGNAL_BASE_URL": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert (nowhere.stdout.strip(), nowhere.stderr) == ("", "")
