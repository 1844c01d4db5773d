"""The demo's command line and the data that it ships; `make demo` runs the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(EXAMPLES / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_data_is_a_chat_per_line() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "pirate.jsonl").read_text().splitlines()]
    assert len(rows) >= 40
    for row in rows:
        assert set(row) == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])
        # What the model is to learn, and what the README's table shows.
        assert row["messages"][1]["content"].startswith("Arr!")
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)


def test_help_names_every_option() -> None:
    shown = demo("--help")
    assert shown.returncode == 0, shown.stderr
    for option in ("--data", "--steps", "--batch", "--out", "--model-folder"):
        assert option in shown.stdout


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        '["a list"]',
        '{"text": "no messages"}',
        '{"messages": "a text"}',
        '{"messages": [{"role": "user", "content": "nobody answers"}]}',
        '{"messages": [{"content": "no role"}]}',
        '{"messages": [{"role": "assistant"}]}',
        '{"messages": [{"role": "assistant", "content": 3}]}',
        '{"messages": [{"role": "pirate", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_a_bad_line_is_refused_by_its_number_before_anything_starts(
    tmp_path: Path, line: str
) -> None:
    data = tmp_path / "my data.jsonl"
    data.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    refused = demo("--data", data)
    assert refused.returncode != 0
    assert f"{data}, line 3:" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "Stack" not in refused.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["--steps", "0"], "--steps"),
        (["--batch", "x"], "--batch"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], words: str) -> None:
    refused = demo(*arguments)
    assert refused.returncode != 0
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    refused = demo("--data", tmp_path / "empty.jsonl")
    assert refused.returncode != 0
    assert "has no rows" in refused.stderr
