"""Options of `signal up`: parsed before anything starts, and handed on unchanged."""

from __future__ import annotations

import pytest

from web.stack.errors import StackError
from web.stack.options import Options, check_devices, parse_model


def test_options_survive_the_way_to_the_supervisor():
    options = Options("/d", "0.0.0.0", 0, "cpu:2x1", (("tiny", "/m"), ("a/b", "org/model")))
    assert Options.from_json(options.to_json()) == options


def test_a_model_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert parse_model("tiny=model") == ("tiny", str(tmp_path / "model"))
    assert parse_model("tiny=./gone") == ("tiny", str(tmp_path / "gone"))


def test_what_is_no_path_stays_a_hub_id():
    assert parse_model("small=org/small-model") == ("small", "org/small-model")


def test_a_path_may_hold_an_equals_sign(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert parse_model(f"m={folder}") == ("m", str(folder))


@pytest.mark.parametrize("text", ["name", "=path", "name=", ""])
def test_a_malformed_model_is_named(text):
    with pytest.raises(StackError, match="--model takes NAME=PATH"):
        parse_model(text)


@pytest.mark.parametrize("text", ["auto", "cpu:2", "cpu:2x1"])
def test_devices_that_the_pool_reads(text):
    check_devices(text)


@pytest.mark.parametrize("text", ["gpu", "cpu:0", "cpu:2x", "cpu:-1"])
def test_other_devices_are_refused_with_the_option(text):
    with pytest.raises(StackError, match="--devices"):
        check_devices(text)
