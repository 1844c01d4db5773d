"""The asynchronous run and client: written from the synchronous ones, and current."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import rewardsignal as rs
from client_lib import generate_async


@pytest.mark.parametrize("twin", [generate_async.RUN, generate_async.CLIENT])
def test_the_files_are_current(twin: generate_async.Twin) -> None:
    text = (generate_async.PACKAGE / twin.target).read_text(encoding="utf-8")
    assert text == generate_async.render(twin)


def calls(kind: type) -> dict[str, Callable[..., Any]]:
    found = inspect.getmembers(kind, callable)
    return {name: call for name, call in found if not name.startswith("_")}


@pytest.mark.parametrize(
    ("sync", "twin", "loops_of_their_own"),
    [
        (rs.SignalRun, rs.AsyncSignalRun, {"training", "inference"}),
        (rs.SignalClient, rs.AsyncSignalClient, {"training", "inference"}),
    ],
)
def test_every_call_has_its_twin_with_the_same_arguments(
    sync: type, twin: type, loops_of_their_own: set[str]
) -> None:
    own, other = calls(sync), calls(twin)
    assert own.keys() - other.keys() == loops_of_their_own
    for name in own.keys() & other.keys():
        expected = list(inspect.signature(own[name]).parameters)
        assert list(inspect.signature(other[name]).parameters) == expected, name
        assert other[name].__doc__, name
