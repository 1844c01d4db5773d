"""For every tier: one real stack, and at the end what this machine lacks and how many tests that left out.

The stack is Valkey, gunicorn, the agent and its Celery workers, the projector and Flower. It starts when a
test first asks for it; the contract and the integration tests share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import stack as stacks
from tests.support.inside import Inside
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model
from tests.support.valkey import settings_for
from workers.queue.journal import Journal
from workers.storage import open_storage

# The shared stack while it runs.
_SHARED: list[RunningStack] = []


@pytest.fixture(scope="session", autouse=True)
def _no_profile_of_the_developer() -> Iterator[None]:
    """Tests neither read nor write the profile file in the home of who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNAL_CONFIG_DIR", stacks.config_dir())
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningStack]:
    """A running stack with the model "tiny" and two CPU slots; nothing of it is left at the end."""
    data_dir = tmp_path_factory.mktemp("stack") / "data dir"
    running = stacks.up(data_dir, "--model", f"tiny={tiny_model}", "--devices", "cpu:2x1")
    _SHARED.append(running)
    try:
        yield running
    finally:
        _SHARED.clear()
        stacks.down(data_dir)


@pytest.fixture(scope="module", autouse=True)
def _no_run_is_left() -> Iterator[None]:
    """Ends the runs that a module left open: they would hold the shared stack's two slots."""
    yield
    for running in _SHARED:
        with Inside(running) as inside:
            settings = settings_for(running.data_dir, "redis://unused")
            journal = Journal(inside.redis, open_storage(settings), settings)
            for run_id in journal.open_runs():
                journal.close(run_id, "cancelled")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why tests were skipped, as what is missing here."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        where = report.longrepr
        text = where[2] if isinstance(where, tuple) else str(where)
        reasons[text.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("what this machine lacks")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{reason} ({count} {'test' if count == 1 else 'tests'} left out)")
