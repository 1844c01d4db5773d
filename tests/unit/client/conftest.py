"""For the tests of the command: no environment, a profile folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.client.cli import Runner


@pytest.fixture(autouse=True)
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile file, which is not there yet; and nothing in the environment."""
    for name in ("SIGNAL_API_KEY", "SIGNAL_BASE_URL", "SIGNAL_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIGNAL_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config" / "profiles.json"


@pytest.fixture
def signal(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs `signal ARGUMENTS…` against scripted answers."""
    return Runner(monkeypatch)
