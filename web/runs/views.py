"""POST and GET /runs, GET /runs/{id} and what belongs to a run's life."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.errors import SignalError
from schemas.fields import Input
from schemas.results import Future
from schemas.runs import (
    CLOSED_STATUSES,
    CompleteRequest,
    Run,
    RunClosed,
    RunCreate,
    RunList,
    RunListQuery,
    SessionState,
)
from web import cursors
from web.answers import encode, json_answer, raw_answer, rfc3339
from web.context import services, user
from web.errors import validation_error
from web.history.branching import begin_from
from web.history.span import span_of
from web.idempotency.decorator import creation_token, idempotent
from web.parsing import Blueprint
from web.runs.access import runs
from web.runs.ending import cancel_run, complete_run
from web.runs.erasing import erase_run
from web.runs.render import LOST, current_step, run_body, session_body, status_of
from web.runs.service import Draft, Filters
from web.runs.tables import RunRow
from workers.queue import keys
from workers.queue.records import Head

blp = Blueprint("runs", __name__, description="Training runs.")


_WAITING = ("queued", "rebuilding")


class NoFields(Input):
    """A request without fields."""


def own_run(run_id: str) -> tuple[RunRow, Head | None]:
    """The caller's run. Raises SignalError not_found for anybody else's."""
    services().facts.get(run_id, user().id)
    return runs().get(run_id), services().journal.head(run_id)


def describe(rows: list[RunRow]) -> list[dict[str, Any]]:
    """The wire forms of runs."""
    journal = services().journal
    heads = journal.heads([row.run_id for row in rows]) if rows else []
    pairs = list(zip(rows, heads, strict=True))
    waiting = [row.run_id for row, head in pairs if status_of(row, head) in _WAITING]
    positions = runs().queue_positions(waiting)
    sharing = runs().sharing(
        [row.run_id for row, head in pairs if head is not None and head.worker]
    )
    return [
        run_body(
            row,
            head,
            positions.get(row.run_id),
            span_of(journal, row, head),
            sharing.get(row.run_id, 0),
        )
        for row, head in pairs
    ]


def read_run(run_id: str) -> dict[str, Any]:
    """The wire form of the caller's run."""
    services().facts.get(run_id, user().id)
    return describe([runs().get(run_id)])[0]


@blp.route("/runs")
class RunsView(MethodView):
    """The caller's runs."""

    @blp.arguments(RunCreate)
    @blp.response(201, Run, description="The run, queued for a device.")
    @idempotent
    def post(self, request: dict[str, Any]) -> Response:
        """Create a run

        The run waits for a device, then its worker loads the model. Operations may be sent at once.
        A setting that this server cannot honour is refused by its name.
        """
        run_id, config = f"run_{creation_token()}", runs().config(request)
        origin = begin_from(request["init_from"], config) if request["init_from"] else None
        draft = Draft(
            run_id,
            user().id,
            request["base_model"],
            config,
            request["name"],
            request["labels"],
            origin,
        )
        runs().create(draft)
        return json_answer(read_run(run_id), 201, {"Location": f"/runs/{run_id}"})

    @blp.arguments(RunListQuery, location="query")
    @blp.response(200, RunList, description="A page of runs, newest first.")
    def get(self, query: dict[str, Any]) -> Response:
        """List runs"""
        s, who = services(), user().id
        filters = Filters(query["status"], query["label"])
        if filters.label is not None and not filters.label.isprintable():
            raise validation_error({"label": ["Not a label."]})
        scope = f"runs|{who}|{filters.status}|{filters.label}"
        before = cursors.decode(s.settings, scope, query["cursor"])
        rows, more = runs().page(who, filters, before, query["limit"])
        found = encode(describe(rows))
        cursor = cursors.encode(s.settings, scope, rows[-1].id) if more else None
        tail = encode({"has_more": more, "next_cursor": cursor})[1:]
        body = b'{"object":"list","data":' + found + b',"runs":' + found + b"," + tail
        return raw_answer(body)


@blp.route("/runs/<run_id>")
class RunView(MethodView):
    """One run."""

    @blp.response(200, Run, description="The run.")
    def get(self, run_id: str) -> Response:
        """Read a run"""
        return json_answer(read_run(run_id))

    @blp.response(204, description="Nothing is left of the run.")
    def delete(self, run_id: str) -> Response:
        """Delete a run

        Erases its journal, bodies, snapshots, saved states, metrics and events from memory, disk and
        database; what is open is cancelled first. Runs that branched from it keep what they need
        (409 run_in_use for the moment until they have it).
        """
        own_run(run_id)
        erase_run(run_id)
        return Response(status=204)


@blp.route("/runs/<run_id>/status")
class RunStatusView(MethodView):
    """The original's name for reading a run."""

    @blp.response(200, Run, description="The run.")
    def get(self, run_id: str) -> Response:
        """Read a run's status

        The same as `GET /runs/{run_id}`.
        """
        return json_answer(read_run(run_id))


@blp.route("/runs/<run_id>/session_state")
class SessionStateView(MethodView):
    """What the run's worker holds."""

    @blp.response(200, SessionState, description="The session.")
    def get(self, run_id: str) -> Response:
        """Read the state of a run's session

        By the journal's word: it never waits for the worker.
        """
        row, head = own_run(run_id)
        worker = _worker(head.worker) if head and head.worker and not head.closed else None
        return json_answer(session_body(row, head, worker))


def _worker(node: str) -> dict[str, Any] | None:
    facts = services().redis.hgetall(keys.worker(node))
    text = {name.decode(): value.decode() for name, value in facts.items()}  # type: ignore[union-attr]
    if not text:
        return {"name": node, "pid": None, "state": "unknown", "heartbeat_at": None}
    pid, beat = text.get("pid"), text.get("heartbeat")
    return {
        "name": node,
        "pid": int(pid) if pid else None,
        "state": text.get("state", "unknown"),
        "heartbeat_at": rfc3339(float(beat)) if beat else None,
    }


@blp.route("/runs/<run_id>/complete")
class CompleteView(MethodView):
    """The good end of a run."""

    @blp.arguments(CompleteRequest)
    @blp.response(200, RunClosed, description="The run is completed.")
    @blp.alt_response(202, schema=Future, description="Not finished yet: poll the future.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Complete a run

        After everything that is queued, a last adapter is saved unless `save` is false, and the run's
        device is freed. Completing a completed run is no error.
        """
        row, head = own_run(run_id)
        status = status_of(row, head)
        if status == "completed":
            return json_answer(_closed(row, head, status, "The run was completed before."))
        if status in CLOSED_STATUSES:
            raise SignalError("run_closed", f"The run is {status}.")
        try:
            outcome = complete_run(run_id, request)
        except SignalError:
            # Two may complete a run at the same time: the later one finds it completed.
            if status_of(*own_run(run_id)) != "completed":
                raise
            return json_answer(_closed(row, head, "completed", "The run was completed before."))
        if isinstance(outcome, Response):
            return outcome
        body = _closed(row, services().journal.head(run_id), "completed", None)
        return json_answer({**body, "artifact": outcome})


@blp.route("/runs/<run_id>/cancel")
class CancelView(MethodView):
    """The early end of a run."""

    @blp.arguments(NoFields)
    @blp.response(200, RunClosed, description="The run is cancelled.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Cancel a run

        Its queued operations end as cancelled, what is running is abandoned, its device is freed, and
        nothing is saved. Cancelling a cancelled run is no error.
        """
        row, head = own_run(run_id)
        status = status_of(row, head)
        if status == "cancelled":
            return json_answer(_closed(row, head, status, "The run was cancelled before."))
        if status in CLOSED_STATUSES or not cancel_run(run_id):
            status = status_of(*own_run(run_id))
            if status not in CLOSED_STATUSES:
                raise SignalError("unavailable", LOST)
            if status != "cancelled":
                raise SignalError("run_closed", f"The run is {status}.")
        return json_answer(_closed(*own_run(run_id), "cancelled", None))


def _closed(row: RunRow, head: Head | None, status: str, message: str | None) -> dict[str, Any]:
    return {
        "success": True,
        "run_id": row.run_id,
        "status": status,
        "current_step": current_step(row, head),
        "artifact": None,
        "message": message,
    }
