"""POST /runs/{id}/pause, POST /runs/{id}/resume."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.history import ResumeRequest
from schemas.runs import Run
from web.answers import json_answer
from web.holds.service import pause_run, resume_run
from web.idempotency.decorator import idempotent
from web.parsing import Blueprint
from web.runs.views import NoFields, own_run, read_run

blp = Blueprint("holds", __name__, description="Pausing and resuming a run.")


@blp.route("/runs/<run_id>/pause")
class PauseView(MethodView):
    """The run stands still."""

    @blp.arguments(NoFields)
    @blp.response(200, Run, description="The run, pausing or paused.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Pause a run

        The running operation ends, a snapshot is written and the device is freed; what is queued stays.
        New operations are refused (409 run_paused) until it is resumed. Pausing twice is no error.
        """
        own_run(run_id)
        pause_run(run_id)
        return json_answer(read_run(run_id))


@blp.route("/runs/<run_id>/resume")
class ResumeView(MethodView):
    """The run goes on."""

    @blp.arguments(ResumeRequest)
    @blp.response(200, Run, description="The run, waiting for a device or going on.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Resume a run

        One that was rolled back, or that was rebuilt to other numbers than it had answered, goes on only
        when `accept` says that its owner has taken note; `hold` of the run says what there is to accept.
        """
        own_run(run_id)
        resume_run(run_id, request["accept"])
        return json_answer(read_run(run_id))
