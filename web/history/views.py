"""POST /runs/{id}/{branch|replay|migrate}, GET /runs/{id}/certificate."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from gpu_pool import of_run
from schemas.errors import SignalError
from schemas.results import Certificate, Future
from schemas.runs import CLOSED_STATUSES, BranchRequest, Run
from web.answers import json_answer
from web.context import services
from web.history.branching import branch, replay
from web.idempotency.decorator import creation_token, idempotent
from web.operations.answering import answer_at_once, answer_when_done, target_of
from web.operations.compile import compile_operation
from web.operations.views import FUTURE_ID, POLL
from web.parsing import Blueprint
from web.runs.access import open_head, runs
from web.runs.ending import cancel_run
from web.runs.projection import wait_for_projection
from web.runs.render import status_of
from web.runs.views import NoFields, own_run, read_run
from workers.queue.journal import held_error

blp = Blueprint("history", __name__, description="What a run's history is good for.")


@blp.route("/runs/<run_id>/branch")
class BranchView(MethodView):
    """Another run from a place of this one's history."""

    @blp.arguments(BranchRequest)
    @blp.response(201, Run, description="The new run, queued for a device.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Branch a run

        The new run begins with the exact state that this one had after `at_seq`: weights, moments,
        accumulated gradients. Works as far back as `branchable` says, on ended runs too.
        """
        row, head = own_run(run_id)
        made = f"run_{creation_token()}"
        runs().create(branch(made, row, head, request))
        return json_answer(read_run(made), 201, {"Location": f"/runs/{made}"})


@blp.route("/runs/<run_id>/certificate")
class CertificateView(MethodView):
    """The run's state in hashes."""

    @blp.response(200, Certificate, description="The certificate.", headers=FUTURE_ID)
    @blp.alt_response(
        202, schema=Future, headers=POLL, description="Not finished yet: poll the future."
    )
    def get(self, run_id: str) -> Response:
        """Read the certificate of a run's state

        Of the state after everything queued before: it takes its place in the order and changes nothing.
        A completed run keeps its last one.
        """
        if status_of(*own_run(run_id)) in CLOSED_STATUSES:
            return _last(run_id)
        target = target_of(run_id)
        try:
            return answer_when_done(target.facts, compile_operation("certificate", {}, target))
        except SignalError as error:
            if error.code != "run_closed":
                raise
            return _last(run_id)


def _last(run_id: str) -> Response:
    row, head = own_run(run_id)
    wait_for_projection(services().db, row, head)
    found = runs().get(run_id).certificate
    if found is None:
        raise SignalError(
            "history_gone", "The run ended without being completed: no certificate is kept of it."
        )
    return json_answer(found)


@blp.route("/runs/<run_id>/replay")
class ReplayView(MethodView):
    """The run's history, done again."""

    @blp.arguments(NoFields)
    @blp.response(
        202, Future, headers=POLL, description="The certificate of the replay, to be polled."
    )
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Replay a run

        A run of its own (label `signal.replay-of`) rebuilds this one's state on a free device, from the
        oldest kept state by its journal, answers with the certificate and ends. Every answer on the way is
        compared with the recorded one; one that differs ends the replay in replay_mismatch.
        """
        made = f"run_{creation_token()}"
        runs().create(replay(made, *own_run(run_id)))
        try:
            target = target_of(made)
            certificate = compile_operation("certificate", {}, target)
            end = compile_operation("complete", {"save": False, "name": None}, target)
            return answer_at_once(target.facts, certificate, end)
        except Exception:
            # Nobody knows this run: it must not hold a device.
            cancel_run(made)
            raise


@blp.route("/runs/<run_id>/migrate")
class MigrateView(MethodView):
    """Another device for the run."""

    @blp.arguments(NoFields)
    @blp.response(200, Run, description="The run, on its way or waiting for its device as before.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Move a run to another device

        Its worker writes a snapshot and lets go of it; a worker on another device takes it over. Nothing
        queued is lost. A run that has no device yet just goes on waiting for one.
        """
        own_run(run_id)
        head = open_head(run_id)
        if head.hold:
            raise held_error(head.hold, head.hold_info)
        if head.worker and not head.move:
            _leave(run_id, head.device or {})
        return json_answer(read_run(run_id))


def _leave(run_id: str, device: dict[str, Any]) -> None:
    s = services()
    with s.db.reading() as session:
        if not of_run.another_is_open(session, run_id, s.settings.max_runs_per_worker):
            raise SignalError("no_other_device")
    if not s.journal.move(run_id, f"{device.get('host')}/{device.get('slot')}"):
        open_head(run_id)
