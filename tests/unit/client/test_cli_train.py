"""`signal train`: rewards, what a break leaves unchanged, how progress is told."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewardsignal._cli import progress, rewards, training
from rewardsignal._cli.progress import Lines, Report, Speed
from rewardsignal._cli.training import Settings, stored
from rewardsignal._schemas import Run
from rewardsignal.data import Dataset
from tests.unit.client.cli import SHOWN, Runner
from tests.unit.client.wire import refusal, reply, sent

SETTINGS = Settings(steps=9, batch_size=4, seed=7, grad_clip_norm=1.0, beta=0.1)
REPORT = Report(
    run_id="run_1", step=3, steps=9, loss=-1e-9, reward=0.5, grad_norm=1.0, learning_rate=1e-4,
    tokens=100, tokens_per_s=1234.5,
)  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 10)
    return path


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("So it is 18.", 18, 1.0),
        ("So it is 18.", "9 + 9 = 18 #### 18", 1.0),
        ("$1,234.50", 1234.5, 1.0),
        ("-3", "3", 0.0),
        ("first 18, then 19", "18", 0.0),
        ("none", "18", 0.0),
        ("none", "none", 0.0),
        (".5", 0.5, 1.0),
        ("between 5-7", 7, 1.0),
        ("x = -7", -7, 1.0),
        ("1,2", 2, 1.0),
    ],
)
def test_number(text: str, answer: Any, reward: float) -> None:
    assert rewards.load("number")(text, {"answer": answer}) == reward


def test_exact() -> None:
    assert rewards.load("exact")(" yes\n", {"answer": "yes"}) == 1.0
    assert rewards.load("exact")("yes.", {"answer": "yes"}) == 0.0


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_the_last_number_is_found_as_it_was_written(value: float) -> None:
    written = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
    assert rewards.last_number(f"from 7 to {written} at last") == float(written.replace(",", ""))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, in the working directory."""
    (tmp_path / "own_rewards.py").write_text(
        "def length(text, row):\n    return len(text) + row['more']\n"
        "def none(text, row):\n    return None\nnumber = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_a_reward_of_one_s_own(module: str) -> None:
    assert rewards.load(f"{module}:length")("abc", {"more": 1}) == 4.0
    with pytest.raises(ValueError, match="gave None"):
        rewards.load(f"{module}:none")("abc", {})


@pytest.mark.parametrize(
    ("name", "said"),
    [("other", "module:function"), (":f", "module:function"), ("no_such_module:f", "imported"),
     ("own_rewards:f", "has no f"), ("own_rewards:number", "is no function")],
)  # fmt: skip
def test_a_reward_that_cannot_be_loaded(module: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rewards.load(name)


def run_with(labels: dict[str, str], **fields: Any) -> Run:
    return Run.from_dict({**SHOWN, "labels": labels, **fields})


def test_settings_survive_as_labels() -> None:
    labels = SETTINGS.labels("dpo", "digest")
    assert stored(run_with({**labels, "own": "label"}), "dpo", "digest") == SETTINGS
    longest = replace(SETTINGS, group_size=64, max_tokens=100_000, reward="a_module.of_mine:reward")
    assert all(len(value) <= 256 for value in longest.labels("grpo", "d" * 32).values())


@pytest.mark.parametrize(
    ("kind", "digest", "status", "said"),
    [("sft", "digest", "paused", "signal train sft"), ("dpo", "other", "paused", "other contents"),
     ("dpo", "digest", "completed", "has ended")],
)  # fmt: skip
def test_what_cannot_go_on(kind: str, digest: str, status: str, said: str) -> None:
    run = run_with(SETTINGS.labels("dpo", "digest"), status=status)
    with pytest.raises(click.UsageError, match=said):
        stored(run, kind, digest)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 30))
def test_after_any_break_the_batches_are_those_of_no_break(
    rows: int, batch_size: int, done: int
) -> None:
    data = Dataset(list(range(rows)))
    settings = replace(SETTINGS, batch_size=batch_size)
    whole = list(islice(training.batches(data, settings, 0), done + 5))
    assert list(islice(training.batches(data, settings, done), 5)) == whole[done:]


def test_one_pass_sees_every_row_once() -> None:
    steps = training.steps_of_one_pass(10, SETTINGS.batch_size)
    given = islice(training.batches(Dataset(list(range(10))), SETTINGS, 0), steps)
    assert sorted(row for batch in given for row in batch) == list(range(10))


def test_lines_of_progress(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    now = iter([100.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    Lines(1).show(REPORT)
    assert capsys.readouterr().out == (
        "step 3/9: reward 0.500, loss 0.0000, 1,234 tokens/s, 0:00:12 left\n"
    )


def test_a_bar_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(progress.display(9, 0, as_json=False), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(progress.display(9, 0, as_json=True), progress.Objects)
    bar = progress.display(9, 2, as_json=False)
    bar.show(REPORT)
    bar.close()
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "3/9, reward 0.500, loss 0.0000, 1,234 tokens/s" in caught.err


def test_speed_leaves_out_the_wait_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 100.0, 101.0, 103.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    speed = Speed()
    assert [speed.after(50), speed.after(50), speed.after(250)] == [0.5, 50.0, 100.0]


@pytest.mark.parametrize(
    ("text", "said"), [("", "has no rows"), ("{\n", "line 1"), ('{"messages": []}\n', "messages")]
)
def test_wrong_data_is_told_before_anything_is_made(
    signal: Runner, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    found = signal("train", "sft", str(path), "--model", "tiny")
    assert found.exit_code == 1
    assert said in found.stderr
    assert signal.asked == []


def test_a_model_is_needed(signal: Runner, chats: Path) -> None:
    models = reply({"models": ["tiny"], "data": [{"name": "tiny"}]})
    found = signal("train", "sft", str(chats), answers=[models])
    assert found.exit_code == 2
    assert "this server has: tiny" in found.stderr


def test_a_run_that_has_done_nothing_is_not_kept(signal: Runner, chats: Path) -> None:
    closed = {"success": True, "run_id": "run_1", "status": "cancelled", "current_step": 0}
    answers = [
        reply(SHOWN, 201), refusal(422, "sequence_too_long"), reply({**SHOWN, "next_seq": 1}),
        reply(closed),
    ]  # fmt: skip
    found = signal(
        "train", "sft", str(chats), "--model", "tiny", "--lr-scheduler", "cosine", answers=answers
    )
    assert found.exit_code == 1
    assert "was cancelled" in found.stderr
    made = sent(signal.wire.requests[0])
    assert (made["lora_r"], made["learning_rate"], made["seed"]) == (16, 2e-4, 0)
    assert made["total_steps"] == math.ceil(10 / 8)
    assert made["labels"]["train"] == "sft"


def test_after_an_error_it_is_said_how_to_go_on(
    signal: Runner, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["signal", "train", "sft", str(chats), "--resume", "run_0"])
    answers = [
        reply(SHOWN, 201), refusal(422, "sequence_too_long"), reply(SHOWN),
        reply({**SHOWN, "status": "paused"}),
    ]  # fmt: skip
    found = signal("train", "sft", str(chats), "--model", "tiny", answers=answers)
    assert found.exit_code == 1
    again = f"signal train sft {chats} --resume {SHOWN['run_id']}"
    assert again in found.stderr.splitlines()[2].strip()


def test_what_was_said_anew_must_be_what_it_was(signal: Runner, chats: Path) -> None:
    labels = replace(SETTINGS, beta=None).labels("sft", training.digest_of(chats))
    run = {**SHOWN, "labels": labels, "status": "paused"}
    found = signal(
        "train", "sft", str(chats), "--resume", "run_1", "--batch-size", "5", answers=[reply(run)]
    )
    assert found.exit_code == 2
    assert "--batch-size: run_0123456789abcdef has 4" in found.stderr
    assert signal.asked == ["GET /runs/run_1"]
