"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.settings import Settings


def env(folder: Path, **more: str) -> dict[str, str]:
    return {
        "SIGNAL_DATA_DIR": str(folder),
        "REDIS_URL": "redis://localhost",
        "SIGNAL_SECRET": "s",
        **more,
    }


def test_defaults_and_overrides(tmp_path: Path) -> None:
    settings = Settings.from_env(env(tmp_path, SIGNAL_DOORBELL="coalesced", SIGNAL_MAX_BODY_MB="1"))
    assert settings.doorbell == "coalesced" and settings.max_body_bytes == 1024 * 1024
    assert (
        settings.database_url.startswith("sqlite:///")
        and settings.models_file == tmp_path / "models.json"
    )


def test_the_secret_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden\n")
    assert Settings.from_env(env(tmp_path, SIGNAL_SECRET="")).secret == "hidden"


@pytest.mark.parametrize(
    "change",
    [
        {"REDIS_URL": ""},
        {"SIGNAL_DATA_DIR": ""},
        {"SIGNAL_DOORBELL": "loud"},
        {"SIGNAL_SYNC_WAIT": "26"},
        {"SIGNAL_MAX_QUEUED": "many"},
        {"SIGNAL_MAX_RUNS_PER_WORKER": "0"},
        {"SIGNAL_MAX_RUNS_PER_WORKER": "2.5"},
        {"SIGNAL_MAX_RUNS_PER_WORKER": "257"},
        {"SIGNAL_RESULT_TTL": "0"},
        {"SIGNAL_SECRET": ""},
        {"SIGNAL_STORAGE": "/srv/signal"},
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings.from_env(env(tmp_path, **change))
