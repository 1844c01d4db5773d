"""mypy --strict on a user's program: what is right passes, what is wrong is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rewardsignal as rs

HERE = Path(__file__).parent
WRONG = """
import rewardsignal as rs

def wrong(run: rs.SignalRun) -> None:
    run.optim_step(nonsense=1.0)
    run.sample("a", max_tokens="many")
    run.forward_backward_async([{"text": "a"}]).result().los
    run.status().current_step = 3
    result: int = run.optim_step()

async def too(run: rs.AsyncSignalRun) -> None:
    run.optim_step().grad_norm
    (await run.optim_step_async()).grad_norm
"""


def mypy(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # As of an installed package: its types count, not what mypy would say of its own lines.
    options = ("--strict", "--follow-imports=silent", "--cache-dir", str(folder / "cache"))
    return subprocess.run(
        # Outside of the repository, so that its own settings do not help.
        [sys.executable, "-m", "mypy", *options, "--config-file=", *arguments],
        cwd=folder, env={**os.environ, "MYPYPATH": str(Path(rs.__file__).parents[1])},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("typed")


def test_a_users_program(folder: Path) -> None:
    done = mypy(str(HERE / "typed" / "program.py"), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_program(folder: Path) -> None:
    program = folder / "wrong.py"
    program.write_text(WRONG, encoding="utf-8")
    done = mypy(str(program), folder=folder)
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert lines == {5, 6, 7, 8, 9, 12, 13}, done.stdout
