"""docs/tinker.md: its script runs, and its table names every method."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.contract.tinker.support import MODEL, key_of
from tests.contract.tinker.test_methods import TABLES, methods
from tests.support.stack import RunningStack

PAGE = (Path(__file__).parents[3] / "docs" / "tinker.md").read_text()


def test_its_script_runs_with_its_three_lines_of_environment(
    stack: RunningStack, tmp_path: Path
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    environment = {
        **os.environ,
        "TINKER_BASE_URL": stack.base_url,
        "TINKER_API_KEY": key_of(stack.api_key),
        "MODEL": MODEL,
    }
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses, tokens, last = done.stdout.splitlines()
    numbers = [float(number) for number in losses.strip("[]").split(",")]
    assert numbers[0] > numbers[-1] > float(last) > 0 and tokens


def test_its_table_names_every_method_that_is_not_only_an_older_form() -> None:
    for client, _ in TABLES:
        for name in methods(client):
            bare = name.removesuffix("_async")
            assert f"`{bare}`" in PAGE, f"{client.__name__}.{name}"
