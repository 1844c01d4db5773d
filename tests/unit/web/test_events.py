"""Events as a stream, without a socket."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.unit.web.test_projector import RUN, add_run
from web import create_app
from web.accounts.service import create_key
from web.events import stream as streaming
from web.events.service import Page
from web.events.stream import line_of, stream
from web.events.tables import RunEventRow
from workers.settings import Settings

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def row(id_: int, kind: str = "ready", **data: Any) -> RunEventRow:
    return RunEventRow(id=id_, run=1, type=kind, at=NOW, data=data, stream_id=f"1-{id_}")


class Hub:
    """Stands where the hub is: every wait ends at once and is counted."""

    def __init__(self, on_wait: Callable[[], None] = lambda: None) -> None:
        self.waits, self._on_wait = 0, on_wait

    @contextmanager
    def watch(self, run_id: str, entries: Collection[int] = ()) -> Iterator[threading.Event]:
        event = threading.Event()
        hub = self

        class Ticking(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                hub.waits += 1
                hub._on_wait()
                return True

        event = Ticking()
        yield event


def read(pages: list[Page | None], hub: Hub, after: int = 0, clock: Any = lambda: 0.0) -> list[str]:
    asked = iter(pages)

    def look(last: int) -> Page | None:
        return next(asked)

    lines = stream(hub, "run_1", after, look, clock)  # type: ignore[arg-type]
    return [line.decode() for line in lines]


def test_a_stream_ends_with_its_run() -> None:
    hub = Hub()
    pages: list[Page | None] = [
        Page([row(3)], more=True, ended=False),
        Page([row(4)], more=False, ended=False),
        Page([], more=False, ended=False),
        Page([row(9, "closed")], more=False, ended=True),
    ]
    first, *rest = read(pages, hub)
    assert first == "retry: 1000\n\n"
    assert [line.splitlines()[0] for line in rest] == ["id: 3", "id: 4", "id: 9"]
    assert hub.waits == 2, "a page that is not the last is followed by the next at once"


def test_a_stream_ends_when_its_run_is_deleted() -> None:
    assert len(read([Page([row(1)], False, False), None], Hub())) == 2


def test_a_silent_stream_beats_and_ends_in_time() -> None:
    now = [0.0]

    def later() -> None:
        now[0] += 10.0

    hub = Hub(later)
    nothing: list[Page | None] = [Page([], False, False)] * 100
    lines = read(nothing, hub, clock=lambda: now[0])
    assert lines[1:] == [": still here\n\n"] * 29
    assert now[0] == streaming.LONGEST_S


def test_an_event_is_one_message() -> None:
    text = line_of(row(7, "worker_lost", why="a\nb")).decode()
    assert text.endswith("\n\n")
    fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
    assert (fields["id"], fields["event"]) == ("7", "worker_lost")
    assert json.loads(fields["data"]) == {
        "id": 7,
        "type": "worker_lost",
        "at": "2026-01-02T03:04:05.000Z",
        "data": {"why": "a\nb"},
    }


def test_the_document_tells_of_both_forms(client: FlaskClient) -> None:
    paths = json.loads(client.get("/openapi.json").data)["paths"]
    events = paths["/runs/{run_id}/events"]["get"]
    assert set(events["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "204" in events["responses"]
    names = {parameter["name"] for parameter in events["parameters"]}
    assert {"after", "wait", "limit", "Last-Event-ID"} <= names


@pytest.fixture
def crowded(settings: Settings) -> Iterator[FlaskClient]:
    """A client of an application with one place for long polls."""
    application = create_app(dataclasses.replace(settings, max_waits=1))
    services = application.extensions["signal"]
    add_run(services.db, RUN, {})
    client = application.test_client()
    key = create_key(services.db, "ann")[1]
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    yield client
    services.close()


def test_a_stream_holds_one_of_the_places_for_long_polls(crowded: FlaskClient) -> None:
    path, accept = f"/runs/{RUN}/events", {"Accept": "text/event-stream"}
    for _ in range(2):
        first = crowded.get(path, headers=accept)
        assert (first.status_code, first.mimetype) == (200, "text/event-stream")
        refused = crowded.get(path, headers=accept)
        assert refused.status_code == 429
        assert crowded.get(f"{path}?wait=1").status_code == 429
        assert crowded.get(path).json == {
            "object": "list", "data": [], "has_more": False, "next_after": 0, "ended": False,
        }  # fmt: skip
        # Read or not, a client that goes away frees it.
        first.close()
