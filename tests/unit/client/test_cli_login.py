"""`signal login`, `whoami`, `logout`, `use`: what is stored, and when nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rewardsignal import _config
from rewardsignal._cli import login as logins
from rewardsignal._client import SignalClient
from rewardsignal._config import Profile
from tests.unit.client.cli import ACCOUNT, Runner
from tests.unit.client.wire import Wire, refusal, reply

HERE = "http://127.0.0.1:8000"


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """The network of `GET /me`."""
    found = Wire(reply(ACCOUNT))

    def client(*args: Any, **options: Any) -> SignalClient:
        return SignalClient(*args, **options, transport=httpx2.MockTransport(found))

    monkeypatch.setattr(logins, "SignalClient", client)
    monkeypatch.setattr("rewardsignal._transport.UNSEEN_RETRY_S", 0.0)
    return found


def test_a_key_from_standard_input(signal: Runner, wire: Wire) -> None:
    result = signal("login", "--with-token", "--base-url", "https://a.test/", input="sk-1\n")
    assert result.stdout == "Logged in to https://a.test as ann (profile default).\n"
    assert result.stderr == ""
    assert wire.requests[0].headers["Authorization"] == "Bearer sk-1"
    assert _config.load().chosen() == Profile("https://a.test", "sk-1")


def test_without_an_address_the_one_before(signal: Runner, wire: Wire) -> None:
    signal("login", "--with-token", input="sk-1")
    assert _config.load().chosen() == Profile(HERE, "sk-1")
    _config.save("default", Profile("https://a.test", "sk-2"))
    signal("login", "--with-token", input="sk-3")
    assert _config.load().chosen() == Profile("https://a.test", "sk-3")


def test_json(signal: Runner, wire: Wire) -> None:
    result = signal("login", "--with-token", "--profile", "work", "--json", input="sk-1")
    assert json.loads(result.stdout) == {**ACCOUNT, "base_url": HERE, "profile": "work"}
    assert "sk-1" not in result.output


def test_a_key_that_the_server_refuses_is_not_stored(
    signal: Runner, wire: Wire, config_file: Path
) -> None:
    wire.answers = [refusal(401, "unauthorized")]
    assert signal("login", "--with-token", input="sk-1").exit_code == 3
    wire.answers = [httpx2.ConnectError("no")]
    assert signal("login", "--with-token", input="sk-1").exit_code == 5
    assert not config_file.exists()


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["--with-token"], "  \n", "no key"),
        ([], "sk-1\n", "--with-token"),
        (["--with-token", "--profile", "local"], "sk-1", "signal up"),
    ],
)
def test_wrong_usage(
    signal: Runner, wire: Wire, config_file: Path, arguments: list[str], text: str, said: str
) -> None:
    result = signal("login", *arguments, input=text)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not config_file.exists()


@pytest.mark.parametrize(
    ("url", "warned"),
    [("http://gpu.test", True), ("https://gpu.test", False), ("http://localhost:1", False)],
)
def test_plain_http_is_warned_of(signal: Runner, wire: Wire, url: str, warned: bool) -> None:
    result = signal("login", "--with-token", "--base-url", url, input="sk-1")
    assert ("plain HTTP" in result.stderr) == warned


def test_whoami(signal: Runner, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal("whoami").exit_code == 3
    _config.save("work", Profile("https://a.test", "sk-1"))
    result = signal("whoami")
    assert result.stdout.split() == [
        "user", "ann", "(user_1)", "server", "https://a.test",
        "key", "abc,", "from", "the", "profile", "work",
    ]  # fmt: skip
    monkeypatch.setenv("SIGNAL_API_KEY", "sk-2")
    found = json.loads(signal("whoami", "--json").stdout)
    assert (found["key_from"], found["base_url"]) == ("SIGNAL_API_KEY", "https://a.test")


def test_logout(signal: Runner) -> None:
    assert signal("logout").stdout == "No profile is in use: nothing to forget.\n"
    _config.save("work", Profile("https://a.test", "sk-1"))
    _config.save("default", Profile("https://b.test", "sk-2"))
    assert signal("logout", "--profile", "other").exit_code == 3
    assert json.loads(signal("logout", "--json").stdout) == {"profile": "default"}
    assert list(_config.load().by_name) == ["work"]
    assert signal("logout", "--profile", "work").stdout == "Forgot the profile work.\n"
    assert _config.load() == _config.Profiles()


def test_use(signal: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    _config.save("work", Profile("https://a.test", "sk-1"))
    _config.save("local", Profile(HERE, "sk-2"))
    assert signal("use", "work").stdout == "work: https://a.test\n"
    rows = json.loads(signal("use", "--json").stdout)
    assert [(row["profile"], row["current"]) for row in rows] == [("local", False), ("work", True)]
    assert "sk-" not in signal("use").output
    assert signal("use", "other").exit_code == 3
    monkeypatch.setenv("SIGNAL_API_KEY", "sk-3")
    assert "SIGNAL_API_KEY" in signal("use", "local").stderr
