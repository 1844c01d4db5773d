"""The profile of `signal up`: what the SDK then finds, and that a login is left as it is."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

import rewardsignal as rs
from rewardsignal import _config
from rewardsignal._config import Profile
from web.stack import profile
from web.stack.errors import StackError

LOCAL = Profile("http://127.0.0.1:8000", "sk-local")
AWAY = Profile("https://away.test", "sk-away")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SIGNAL_API_KEY", "SIGNAL_BASE_URL", "SIGNAL_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIGNAL_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config" / "profiles.json"


def store(found: Profile) -> str:
    return profile.store(found.base_url, found.api_key)


def test_both_sides_look_in_the_same_place(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile.path() == _config.path() == file
    monkeypatch.delenv("SIGNAL_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profile.path() == _config.path()


def test_the_sdk_finds_what_up_wrote(file: Path) -> None:
    assert "use it" in store(LOCAL)
    assert rs.SignalClient().base_url == LOCAL.base_url
    assert _config.load().chosen() == LOCAL
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_newest_stack_is_the_local_one() -> None:
    store(LOCAL)
    store(Profile("http://127.0.0.1:9000", "sk-new"))
    assert rs.SignalClient().base_url == "http://127.0.0.1:9000"


def test_a_login_stays_the_current_one() -> None:
    _config.save("default", AWAY)
    told = store(LOCAL)
    assert AWAY.base_url in told
    assert "signal use local" in told
    assert _config.load().chosen() == AWAY
    assert _config.use("local") == LOCAL
    assert "use it" in store(LOCAL)


def test_after_a_logout_the_stack_is_the_current_one() -> None:
    _config.save("default", AWAY)
    _config.forget("default")
    store(LOCAL)
    assert _config.load().chosen() == LOCAL


@pytest.mark.parametrize("text", ["{", "[]", '{"profiles": 7}'])
def test_a_damaged_file_is_left_as_it_is(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(StackError, match="damaged"):
        store(LOCAL)
    assert file.read_text() == text


def test_a_folder_that_cannot_be_made(file: Path) -> None:
    file.parent.write_text("not a folder")
    with pytest.raises(StackError, match="not stored"):
        store(LOCAL)


def test_what_a_newer_client_keeps_there_stays(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"new": 1}))
    store(LOCAL)
    assert json.loads(file.read_text())["new"] == 1
