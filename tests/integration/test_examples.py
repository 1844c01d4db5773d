"""The example loops against a real stack, in their short form: each must learn, by a margin.

The tiny model is random, so what it can learn in seconds is which tokens pay: that is enough to see a loop
that does not train, trains on the wrong thing, or in the wrong direction. Seeds are fixed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rewardsignal import SignalClient
from rewardsignal.data import Batches
from tests.support.stack import RunningStack

EXAMPLES = Path(__file__).parents[2] / "examples"
LOOPS = (
    "custom_loss",
    "distill",
    "dpo",
    "grpo",
    "pipelining",
    "ppo",
    "resume_and_branch",
    "sft",
)


def example(name: str) -> ModuleType:
    """The file as a module; the folder is no package, as people run its files."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _server(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names the stack by the environment, as a user does."""
    monkeypatch.setenv("SIGNAL_BASE_URL", stack.base_url)
    monkeypatch.setenv("SIGNAL_API_KEY", stack.api_key)


def short(name: str, *options: object) -> dict[str, Any]:
    """Runs an example on the tiny model; returns what it found."""
    found: dict[str, Any] = example(name).main(["--model", "tiny", *map(str, options)])
    return found


@pytest.mark.usefixtures("_server")
def test_sft(capsys: pytest.CaptureFixture[str]) -> None:
    found = short("sft", "--steps", 12, "--lr", 1e-2)
    # A model that knows nothing of 512 tokens is at 6.2 nats.
    assert found["before"] > 6.2
    assert found["after"] < 5.3
    shown = capsys.readouterr().out.splitlines()
    assert shown[11].startswith("step  12  loss ")
    assert shown[12].startswith(f"{found['run_id']}: held-out loss {found['before']:.3f} -> ")


@pytest.mark.usefixtures("_server")
def test_dpo() -> None:
    found = short("dpo", "--steps", 5, "--lr", 3e-3)
    assert found["margin"] > 1.0
    assert found["accuracy"] == 1.0


@pytest.mark.usefixtures("_server")
def test_grpo() -> None:
    found = short("grpo", "--steps", 20, "--lr", 3e-2)
    assert found["before"] < 0.06
    assert found["after"] > 0.11


@pytest.mark.usefixtures("_server")
def test_ppo() -> None:
    found = short("ppo", "--steps", 20, "--lr", 3e-2, "--samples", 16, "--max-tokens", 12)
    assert found["after"] > found["before"] + 0.12
    first, last = found["critic"]
    assert last < first / 3


@pytest.mark.usefixtures("_server")
def test_distill() -> None:
    taught = short("sft", "--steps", 20, "--lr", 1e-2)
    teacher = f"{taught['run_id']}/final"
    found = short("distill", "--teacher", teacher, "--steps", 12, "--lr", 5e-3)
    assert found["before"] > 0.7
    assert found["after"] < found["before"] - 0.4


@pytest.mark.usefixtures("_server")
def test_distill_from_a_system_prompt() -> None:
    options = ("--window", 2, "--lr", 5e-3, "--prompts", 8, "--samples", 8)
    found = short("distill", "--steps", 10, *options)
    assert found["after"] < found["before"] - 0.1


@pytest.mark.usefixtures("_server")
def test_custom_loss() -> None:
    found = short("custom_loss", "--steps", 8, "--lr", 1e-2)
    assert found["before"] > 6.2
    assert found["after"] < 5.5


@pytest.mark.parametrize("logprob", [-0.01, -0.7, -5.0])
def test_focal_gradient_is_that_of_its_loss(logprob: float) -> None:
    focal, step = example("custom_loss").focal_token, 1e-6
    slope = (focal(logprob + step, 2.0)[0] - focal(logprob - step, 2.0)[0]) / (2 * step)
    assert focal(logprob, 2.0)[1] == pytest.approx(slope, rel=1e-4)
    assert focal(logprob, 0.0) == pytest.approx((-logprob, -1.0))


@pytest.mark.usefixtures("_server")
def test_pipelining() -> None:
    found = short("pipelining", "--steps", 10, "--lr", 1e-2)
    waiting, pipelined = found["one_by_one"], found["pipelined"]
    assert len(pipelined["losses"]) == 10
    assert pipelined["losses"] == waiting["losses"]
    assert pipelined["sha256"] == waiting["sha256"]
    assert pipelined["losses"][-1] < pipelined["losses"][0] - 1.0


@pytest.mark.usefixtures("_server")
def test_resume_and_branch() -> None:
    found = short("resume_and_branch", "--lr", 1e-2)
    hashes = found["certificates"]
    assert hashes["same"] == hashes["run"] != hashes["other rate"]
    assert len(found["losses"]) == 8
    assert found["losses"][-1] < found["losses"][0] - 1.0


def test_an_epoch_of_batches_by_tokens(stack: RunningStack) -> None:
    """Whose number nobody knows beforehand."""
    rows = [{"tokens": [5 + place] * 30} for place in range(7)]
    with (
        SignalClient(stack.api_key, stack.base_url) as client,
        client.create_run("tiny", lora_r=4) as run,
    ):
        epoch = run.training().train_epoch(Batches(rows, max_tokens=64), progress=False)
        assert (epoch.num_batches, epoch.final_step) == (4, 4)


def test_rewards_are_what_they_say() -> None:
    sums, lipogram = example("grpo").reward, example("ppo").reward
    assert sums("7", 7) == 1.2
    assert sums("3 + 4 = 7", 7) == pytest.approx(1 + 0.2 * 3 / 9)
    assert sums("70", 7) == 0.2
    assert sums("", 7) == sums("seven", 7) == 0.0
    assert lipogram("A big Eel - 42!") == pytest.approx(2 / 3)
    assert lipogram("42 !") == 0.0
    assert len(example("grpo").sums()) == 81


@pytest.mark.parametrize("name", LOOPS)
def test_a_wrong_option_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example(name).main(["--help"])
    assert "--model" in capsys.readouterr().out


def test_the_page_lists_every_loop() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"demo", "verify_adapter"}
    assert files == set(LOOPS)
    assert all(f"[{name}.py]({name}.py)" in page for name in files)


def test_the_preferences_differ_in_manner_alone() -> None:
    rows = list(example("dpo").read_preferences(EXAMPLES / "preferences.jsonl"))
    assert len({row["prompt"] for row in rows}) == len(rows) >= 24
    for row in rows:
        assert row["chosen"] in row["rejected"]
        assert len(row["rejected"]) > 3 * len(row["chosen"])
