"""The profile file: who reads what from it, and who may read it at all."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

import pytest

import rewardsignal as rs
from rewardsignal import _config
from rewardsignal._config import Profile, Profiles

HOME = Profile("https://home.test", "sk-home")
AWAY = Profile("https://away.test/", "sk-away")


@pytest.fixture
def file(config_file: Path) -> Path:
    """The file of the test, which is not there yet."""
    return config_file


def test_the_folder_of_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIGNAL_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _config.path() == tmp_path / "rewardsignal" / "profiles.json"


def test_what_is_saved_is_loaded_and_current(file: Path) -> None:
    assert _config.load() == Profiles()
    _config.save("default", HOME)
    _config.save("local", AWAY)
    assert _config.load() == Profiles("local", {"default": HOME, "local": AWAY})
    assert _config.use("default") == HOME
    assert _config.load().chosen() == HOME
    with pytest.raises(rs.AuthenticationError, match="default, local"):
        _config.use("elsewhere")


def test_its_owner_alone_reads_it(file: Path) -> None:
    _config.save("default", HOME)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_others_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    _config.save("default", HOME)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert _config.load().chosen() == HOME
    assert "chmod 600" in caplog.text
    # Writing it closes it.
    _config.use("default")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_forget(file: Path) -> None:
    _config.save("default", HOME)
    _config.save("local", AWAY)
    assert _config.forget("local")
    assert not _config.forget("local")
    assert _config.load() == Profiles(None, {"default": HOME})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"profiles": []}', '{"profiles": {"a": {"base_url": "http://x"}}}',
     '{"profiles": {"a": {"base_url": "http://x", "api_key": 7}}}', "\udcff"],
)  # fmt: skip
def test_a_damaged_file(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(rs.AuthenticationError, match=r"profiles\.json is damaged"):
        rs.SignalClient()
    # Who says both needs no file.
    assert rs.SignalClient("sk-test", "http://signal.test").base_url == "http://signal.test"


def test_a_file_that_cannot_be_read(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(rs.AuthenticationError, match="cannot be read"):
        rs.SignalClient()


def test_arguments_then_environment_then_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    _config.save("default", HOME)
    assert _config.resolve(None, None) == HOME
    assert _config.resolve("sk-own", None) == Profile(HOME.base_url, "sk-own")
    monkeypatch.setenv("SIGNAL_API_KEY", "sk-env")
    monkeypatch.setenv("SIGNAL_BASE_URL", "http://env.test")
    assert _config.resolve(None, None) == Profile("http://env.test", "sk-env")
    assert _config.resolve("sk-own", None) == Profile("http://env.test", "sk-own")
    assert _config.resolve(None, "http://own.test") == Profile("http://own.test", "sk-env")


def test_without_a_profile_a_key_is_for_the_embedded_stack() -> None:
    assert _config.resolve("sk-own", None) == Profile(_config.DEFAULT_BASE_URL, "sk-own")


def test_a_stored_key_goes_to_its_own_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _config.save("local", AWAY)
    _config.save("default", HOME)
    assert _config.resolve(None, "https://AWAY.test").api_key == "sk-away"
    monkeypatch.setenv("SIGNAL_BASE_URL", "https://elsewhere.test")
    with pytest.raises(
        rs.AuthenticationError, match=r"has default, local, but none of https://elsewhere\.test"
    ):
        rs.SignalClient()


def test_of_one_server_s_keys_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Profile(HOME.base_url, "sk-other")
    _config.write(Profiles("b", {"a": HOME, "b": other}))
    assert _config.resolve(None, HOME.base_url) == other
    monkeypatch.setenv("SIGNAL_PROFILE", "a")
    assert _config.resolve(None, HOME.base_url) == HOME
    assert _config.resolve(None, None) == HOME
    monkeypatch.setenv("SIGNAL_PROFILE", "c")
    with pytest.raises(rs.AuthenticationError, match="SIGNAL_PROFILE"):
        rs.SignalClient()


def test_no_key_says_where_keys_are_looked_for(file: Path) -> None:
    with pytest.raises(rs.AuthenticationError) as caught:
        rs.SignalClient()
    for place in ("api_key", "SIGNAL_API_KEY", "signal login", str(file)):
        assert place in str(caught.value)


def test_after_a_logout_the_others_are_named() -> None:
    _config.save("local", AWAY)
    _config.save("default", HOME)
    _config.forget("default")
    with pytest.raises(rs.AuthenticationError, match="has local, but none in use"):
        rs.SignalClient()


def test_a_key_is_not_shown() -> None:
    assert "sk-home" not in repr(Profiles("a", {"a": HOME}))


def test_unknown_fields_of_a_newer_version(file: Path) -> None:
    file.parent.mkdir()
    one = {"base_url": HOME.base_url, "api_key": HOME.api_key, "new": 1}
    file.write_text(json.dumps({"current": "a", "profiles": {"a": one}, "new": 2}))
    file.chmod(0o600)
    assert _config.load().chosen() == HOME
