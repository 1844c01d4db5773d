"""Runs, futures and artifacts as the wire shows them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from marshmallow import Schema

from schemas.results import Future, Operation
from schemas.runs import Run, SessionState
from web.artifacts.tables import ArtifactRow
from web.artifacts.views import artifact_body
from web.futures.render import future_bytes, operation_body
from web.runs.render import branchable_of, run_body, session_body
from web.runs.tables import RunRow
from workers.queue.futures import parse_future_id
from workers.queue.records import Entry, Head, Snapshot
from workers.settings import Settings

RUN = "run_0123456789abcdef"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _check(schema: Schema, body: dict[str, Any]) -> None:
    """The body is what the schema says, no more and no less."""
    assert not schema.validate(json.loads(json.dumps(body)))
    required = {name for name, field in schema.fields.items() if field.required}
    assert required <= set(body) <= set(schema.fields)


def row(**changes: Any) -> RunRow:
    values: dict[str, Any] = {
        "id": 1, "run_id": RUN, "user_id": "user_1", "name": None, "base_model": "tiny",
        "config": {"seed": 0}, "labels": {"a": "b"}, "status": "queued", "error": None,
        "device": None, "current_step": 0, "projected_seq": 0, "created_at": NOW,
        "updated_at": NOW, "started_at": None, "ended_at": None, "parent": None, "origin": None,
        "certificate": None,
    }  # fmt: skip
    return RunRow(**{**values, **changes})


def head(**changes: Any) -> Head:
    values: dict[str, Any] = {
        "run_id": RUN, "owner": "user_1", "epoch": 1, "entries": 5,
        "seq_count": 5, "base": 1, "applied": 3, "closed": "", "close_error": None, "worker": "cpu0-1@host",
        "worker_state": "ready", "device": {"host": "h", "slot": "cpu0", "kind": "cpu",
        "name": "CPU", "dtype": "float32", "threads": 1}, "state": {"step": 2, "accumulated": 1},
        "last_activity": NOW.timestamp() + 60, "running": 4, "hold": "", "hold_info": {}, "move": "",
        "rolled": False, "snapshot": None, "branch_from": None, "deterministic_since": 0,
        "fingerprint": None, "queued_bytes": 0, "unsealed_bytes": 70,
    }  # fmt: skip
    return Head(**{**values, **changes})


def entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "run_id": RUN, "number": 7, "seq": 6, "kind": "sample", "status": "pending", "lane": None,
        "client_seq": None, "submitted_at": 1.0, "started_at": None, "finished_at": None,
        "tokens": 3, "error": None, "result_ref": "", "digest": "",
        "tag": "0a1b2c3d",
    }  # fmt: skip
    return Entry(**{**values, **changes})


def test_the_journal_has_the_newer_word_on_a_run() -> None:
    body = run_body(row(), head(), None, None)
    _check(Run(unknown="raise"), body)
    assert (body["status"], body["current_step"]) == ("ready", 2)
    assert (body["next_seq"], body["applied_seq"], body["queued"]) == (6, 3, 2)
    assert body["device"]["dtype"] == "float32"
    assert "threads" not in body["device"]
    assert body["updated_at"] == "2026-01-02T03:05:05.000Z"


def test_a_waiting_run_says_where_it_stands() -> None:
    body = run_body(row(), head(worker_state="", device=None, state={}), 3, None)
    _check(Run(unknown="raise"), body)
    assert (body["status"], body["queue_position"], body["device"]) == ("queued", 3, None)


def test_a_closed_run_is_closed_at_once_and_stays_so_without_its_journal() -> None:
    error = {"code": "worker_lost", "message": "It died.", "retryable": False}
    body = run_body(row(status="ready"), head(closed="failed", close_error=error), None, None)
    _check(Run(unknown="raise"), body)
    assert (body["status"], body["error"], body["queued"]) == ("failed", error, 0)
    assert body["ended_at"] is not None
    later = run_body(
        row(status="failed", error=error, current_step=2, projected_seq=3, ended_at=NOW),
        None,
        None,
        {"from": 2, "to": 3},
    )
    _check(Run(unknown="raise"), later)
    assert (later["status"], later["error"], later["applied_seq"]) == ("failed", error, 3)


def test_a_lost_journal_is_being_made_anew() -> None:
    body = run_body(row(status="ready", current_step=2, projected_seq=4), None, None, None)
    _check(Run(unknown="raise"), body)
    assert (body["status"], body["error"]) == ("rebuilding", None)
    assert (body["applied_seq"], body["journal"], body["hold"]) == (4, None, None)


@pytest.mark.parametrize(
    ("hold", "info", "worker", "status", "shown"),
    [
        ("paused", {"reason": "user"}, "cpu0", "pausing", ("user", {}, None)),
        ("paused", {"reason": "idle"}, "", "paused", ("idle", {}, None)),
        ("rolled_back", {"at_seq": 3}, "cpu0", "rolled_back", ("rolled_back", {"at_seq": 3}, "rolled_back")),
        ("mismatch", {"seq": 2}, "", "paused", ("mismatch", {"seq": 2}, "rebuilt")),
    ],
)  # fmt: skip
def test_a_held_run_says_why_and_what_to_accept(
    hold: str, info: dict[str, Any], worker: str, status: str, shown: tuple[Any, ...]
) -> None:
    body = run_body(row(), head(hold=hold, hold_info=info, worker=worker), None, None)
    _check(Run(unknown="raise"), body)
    assert body["status"] == status
    assert tuple(body["hold"].values()) == shown
    closed = run_body(row(), head(hold=hold, hold_info=info, closed="cancelled"), None, None)
    assert (closed["status"], closed["hold"]) == ("cancelled", None)


def test_what_a_loss_would_cost_is_shown() -> None:
    snapshot = Snapshot(seq=2, key="k", at=NOW.timestamp(), size_bytes=9, cost_s=0.1)
    known = {"deterministic": False, "why_not": "two threads", "engine": "1"}
    found = head(
        state={"step": 2, "recovery_s": 1.5},
        snapshot=snapshot,
        fingerprint=known,
        deterministic_since=1,
    )
    body = run_body(row(), found, None, {"from": 0, "to": 3})
    _check(Run(unknown="raise"), body)
    assert body["snapshot"] == {"seq": 2, "at": "2026-01-02T03:04:05.000Z", "size_bytes": 9}
    assert body["deterministic"] == {"now": False, "why_not": "two threads", "since_seq": 1}
    assert (body["recovery_s"], body["fingerprint"]) == (1.5, known)
    assert body["journal"] == {"operations": 4, "bytes": 70}
    assert body["branchable"] == {"from": 0, "to": 3}


def test_a_run_shows_what_it_began_from() -> None:
    origin = {"run_id": "run_1", "seq": 7, "artifact": "runs/run_1/artifacts/a", "name": "a"}
    body = run_body(row(parent="run_1", origin=origin), head(), None, None)
    assert body["parent"] == {"run_id": "run_1", "seq": 7, "artifact": "a"}
    branch = {"run_id": "run_1", "seq": 7, "artifact": None, "optimizer": True}
    body = run_body(row(parent="run_1", origin=branch), head(), None, None)
    assert body["parent"] == {"run_id": "run_1", "seq": 7, "artifact": None}


def test_what_can_be_branched_from_by_the_journals_word() -> None:
    assert branchable_of(row(), head(base=0)) == {"from": 0, "to": 3}
    assert branchable_of(row(), head(base=1)) is None
    assert branchable_of(row(), head(base=1, branch_from=1)) == {"from": 1, "to": 3}
    branch = row(origin={"run_id": "run_1", "seq": 7})
    assert branchable_of(branch, head(base=0)) is None, (
        "the journal alone does not say where it began"
    )
    assert branchable_of(branch, head(base=0, branch_from=0)) == {"from": 0, "to": 3}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (head(), "active"),
        (head(worker_state="loading"), "uninitialized"),
        (head(worker_state=""), "uninitialized"),
        (head(worker_state="rebuilding"), "uninitialized"),
        (head(hold="paused", worker=""), "uninitialized"),
        (head(hold="paused"), "active"),
        (head(closed="completed"), "closed"),
        (None, "uninitialized"),
    ],
)
def test_session_state(found: Head | None, status: str) -> None:
    worker = {"name": "cpu0-1@host", "pid": 1, "state": "idle", "heartbeat_at": None}
    body = session_body(row(), found, worker)
    _check(SessionState(unknown="raise"), body)
    assert body["status"] == status
    assert body["accumulation_count"] == (1 if found else 0)


def test_a_pending_future_says_what_is_ahead(settings: Settings) -> None:
    body = json.loads(future_bytes(settings, entry(), 3, None))
    _check(Future(unknown="raise"), body)
    assert (body["position"], body["result"], body["error"]) == (2, None, None)
    assert parse_future_id(settings, body["future_id"]) == (RUN, 7, "0a1b2c3d")
    running = json.loads(future_bytes(settings, entry(status="running"), 5, None))
    assert running["position"] is None
    waiting = json.loads(future_bytes(settings, entry(seq=None), 5, None))
    assert (waiting["position"], waiting["seq"]) == (None, None)


def test_a_finished_future_holds_the_stored_bytes(settings: Settings) -> None:
    done = entry(status="completed", started_at=2.0, finished_at=3.0, result_ref="inline")
    raw = b'{"loss": 1.50}'
    body = future_bytes(settings, done, 0, raw)
    assert raw in body
    _check(Future(unknown="raise"), json.loads(body))
    expired = json.loads(future_bytes(settings, done, 0, None))
    assert expired["error"]["code"] == "future_expired"


def test_a_line_of_the_journal(settings: Settings) -> None:
    error = {"code": "non_finite", "message": "No.", "retryable": False}
    body = operation_body(settings, entry(status="failed", error=error))
    _check(Operation(unknown="raise"), body)
    assert body["error"] == error


def test_an_artifact_lists_its_files_with_safe_urls() -> None:
    file = {"path": "a b/c.json", "size_bytes": 3, "sha256": "0" * 64}
    manifest = {"files": [file], "name": "step-000001"}
    found = ArtifactRow(
        id=1, run_id=RUN, name="step-000001", mode="adapter", seq=1, step=1, size_bytes=3,
        manifest=manifest, created_at=NOW,
    )  # fmt: skip
    (listed,) = artifact_body(found)["files"]
    assert listed["url"] == f"/runs/{RUN}/artifacts/step-000001/files/a%20b/c.json"
