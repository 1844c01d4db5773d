"""The seed, the stack to be broken, the undisturbed run that all others are held to, and the report."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import Chaos, chaos_stack
from tests.chaos.report import Report

# CHAOS_SEED=n, or make chaos SEED=n. The short form always draws the same, so that it is one test.
SEED = int(os.environ.get("CHAOS_SEED") or 1)
_REPORT = Report(SEED)


@dataclass(frozen=True)
class Reference:
    """The course undisturbed: results, and the certificate of the state behind them."""

    results: list[dict[str, Any]]
    certificate: dict[str, Any]


@pytest.fixture(scope="session")
def report() -> Report:
    """What is printed at the end."""
    return _REPORT


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Chance by the seed and the test's name, so that a test draws the same alone and in company."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Chaos]:
    """The stack that most tests break, one after the other."""
    with chaos_stack(tmp_path_factory.mktemp("chaos"), tiny_model) as found:
        yield found


@pytest.fixture(scope="session")
def reference(chaos: Chaos) -> Reference:
    """Two slots, one run, nobody interferes."""
    with chaos.run() as run:
        results = chaos.train(run)
        return Reference(results, chaos.certificate(run))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure says which seed it came from."""
    outcome: Any = yield
    found = outcome.get_result()
    if found.failed and "tests/chaos" in str(item.path):
        found.sections.append(("chaos", f"SEED={SEED} (make chaos SEED={SEED})"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of kills."""
    if lines := _REPORT.lines():
        _REPORT.write()
        terminalreporter.section(f"chaos, seed {SEED}")
        for line in lines:
            terminalreporter.line(line)
