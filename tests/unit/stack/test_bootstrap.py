"""Which build of torch `make setup` takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[3] / "deploy" / "bootstrap.py"
_SPEC = importlib.util.spec_from_file_location("bootstrap", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
bootstrap = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bootstrap)


@pytest.mark.parametrize(
    ("wanted", "versions", "torch"),
    [
        ("cpu", ["2.15.0", "2.13.0+cpu", "2.13.0"], "torch===2.13.0+cpu"),
        ("cpu", ["2.15.0", "2.13.0"], "torch===2.13.0"),
        ("cuda", ["2.13.0+cpu", "2.13.0"], "torch===2.13.0"),
        ("cuda", ["2.13.0+cu130", "2.13.0+cpu"], "torch===2.13.0+cu130"),
        ("cuda", ["2.13.0+cpu"], None),
        ("cpu", ["2.14.0", "2.13.0rc1"], None),
        ("cpu", [], None),
    ],
)
def test_choose(wanted, versions, torch):
    assert bootstrap.choose(wanted, versions) == torch


def test_the_fallback_is_known_to_be_one():
    assert bootstrap.is_wanted("cpu", "torch===2.13.0+cpu")
    assert not bootstrap.is_wanted("cpu", "torch===2.13.0")
    assert bootstrap.is_wanted("cuda", "torch===2.13.0")


def test_the_fingerprint_tells_builds_apart():
    assert bootstrap.fingerprint_of("cpu") != bootstrap.fingerprint_of("cuda")
    assert bootstrap.fingerprint_of("cpu") == bootstrap.fingerprint_of("cpu")
