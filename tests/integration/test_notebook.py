"""docs/notebook.ipynb is executed, kernel restart included, and each cell shows what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rewardsignal as rs
from tests.support.notebook import kernels
from tests.support.stack import RunningStack

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def executed(stack: RunningStack, kernel: int, folder: Path) -> list[dict[str, str]]:
    """What the cells of a kernel show."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SIGNAL_")}
    own = {"SIGNAL_BASE_URL": stack.base_url, "SIGNAL_API_KEY": stack.api_key}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.notebook", str(NOTEBOOK), str(kernel)],
        cwd=folder, env=inherited | own | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


def test_it_is_a_notebook_without_outputs() -> None:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in found["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert len(kernels(NOTEBOOK)) == 2


def test_every_cell_does_what_it_says(stack: RunningStack, tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    made, epoch, names, plot = executed(stack, 0, tmp_path)
    assert made["text"].startswith("<SignalRun run_")
    assert "num_batches=10" in epoch["text"]
    assert epoch["html"].startswith("<table>")
    assert "'loss'" in names["text"]
    assert "'reward'" in names["text"]
    assert "Axes" in plot["text"]

    next_seq, result, sample, closed = executed(stack, 1, tmp_path)
    assert next_seq["text"] == "21"
    assert result["text"].startswith("BatchResult(loss=")
    assert "step=11" in result["text"]
    assert sample["text"].startswith("SampleResult(")
    assert "status='completed'" in closed["text"]

    with rs.SignalClient(stack.api_key, stack.base_url) as client:
        run = client.run((tmp_path / "run_id.txt").read_text())
        assert run.info.status == "completed"
        _, losses = run.metrics().series("loss")
        assert len(losses) == 11
        assert losses[-1] < losses[0]
        assert run.metrics().series("reward")[1] == [0.4]
