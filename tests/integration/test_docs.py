"""Every code block of the README and of docs/ is executed, page by page, against a real stack.

A page's `python` blocks share a namespace, as somebody would type them; its `console` blocks run the lines
after `$ `. Blocks of other kinds show output or files. The model of the pages is the tests' tiny one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import stack as stacks
from tests.support.stack import RunningStack

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "client_lib" / "README.md", *ROOT.glob("docs/**/*.md"))
)
# Its script is run with the SDK that it is about by tests/contract/tinker/test_docs.py.
OF_ITS_OWN = "docs/tinker.md"
# Commands whose test is another one, or is CI itself; all others run here.
ELSEWHERE = {
    "make demo": "tests/integration/test_demo.py",
    "make test": ".ci/run",
    "make setup model": ".ci/run, which makes both",
    ".venv/bin/signal up": "the stack of these tests",
    ".venv/bin/signal down": "the stack of these tests",
}
KINDS = {"python", "console", "text", "json", "jsonl", ""}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    line: int
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    kind: str | None = None
    begun, lines = 0, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence is None:
            lines.append(line)
        elif kind is None:
            kind, begun, lines = fence[1], number, []
        else:
            yield Block(kind, begun, "\n".join(lines))
            kind = None


@pytest.fixture(scope="module")
def documented(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningStack]:
    """A stack whose model has the name that the pages use."""
    data_dir = tmp_path_factory.mktemp("documented") / "data"
    running = stacks.up(data_dir, "--model", f"smollm2={tiny_model}", "--devices", "cpu:2x1")
    try:
        yield running
    finally:
        stacks.down(data_dir)


@pytest.fixture
def place(documented: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's root, and an environment that knows the stack."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIGNAL_BASE_URL", documented.base_url)
    monkeypatch.setenv("SIGNAL_API_KEY", documented.api_key)
    monkeypatch.setenv("SIGNAL_DATA_DIR", str(documented.data_dir))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page != OF_ITS_OWN])
@pytest.mark.timeout(240)
def test_every_block_runs(page: str, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.kind in KINDS, f"{where}: what is {block.kind!r}?"
        if block.kind == "python":
            exec(compile(block.text, where, "exec"), namespace)
        elif block.kind == "console":
            _type(block.text, where, namespace)


def _type(text: str, where: str, namespace: dict[str, Any]) -> None:
    """Run the lines of a console block, with the id of the page's run as RUN."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE)
    assert commands, f"{where}: a console block without a command"
    run = namespace.get("run")
    environment = {**os.environ, **({"RUN": run.run_id} if run is not None else {})}
    for command in commands:
        plain = command.split("  #")[0].strip()
        if any(plain == known or plain.startswith(f"{known} ") for known in ELSEWHERE):
            continue
        done = subprocess.run(
            ["bash", "-c", plain],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{where}: {plain}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
