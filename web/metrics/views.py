"""GET and POST /runs/{id}/metrics."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.metrics import MetricRow as MetricRowSchema
from schemas.metrics import MetricsPost, MetricsQuery, RunMetrics
from web import cursors
from web.answers import json_answer, rfc3339
from web.context import services
from web.idempotency.decorator import creation_token, idempotent
from web.metrics import service
from web.metrics.tables import MetricRow
from web.parsing import Blueprint
from web.runs.projection import wait_for_projection
from web.runs.render import current_step
from web.runs.views import own_run

blp = Blueprint("metrics", __name__, description="The series of a run.")


@blp.route("/runs/<run_id>/metrics")
class MetricsView(MethodView):
    """The series of a run."""

    @blp.arguments(MetricsQuery, location="query")
    @blp.response(200, RunMetrics, description="Rows in the order in which they were recorded.")
    def get(self, query: dict[str, Any], run_id: str) -> Response:
        """Read a run's metrics

        The numbers of its operations (`source` run) and the user's own (`source` user). Everything that
        had finished when the request came is in the answer.
        """
        row, head = own_run(run_id)
        s = services()
        scope = f"metrics|{run_id}"
        after = cursors.decode(s.settings, scope, query["cursor"])
        wait_for_projection(s.db, row, head)
        rows, more = service.page(s.db, run_id, after, query["limit"])
        body = {
            "run_id": run_id,
            "step": current_step(row, head),
            "metrics": [metric_body(one) for one in rows],
            "has_more": more,
            "next_cursor": cursors.encode(s.settings, scope, rows[-1].id) if more else None,
        }
        return json_answer(body)

    @blp.arguments(MetricsPost)
    @blp.response(201, MetricRowSchema, description="The row, as it was recorded.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Record numbers of your own

        Such as a reward; they stand in the series beside the run's.
        """
        row, head = own_run(run_id)
        step = request["step"] if request["step"] is not None else current_step(row, head)
        made = service.add_own(services().db, run_id, step, request["metrics"], creation_token())
        return json_answer(metric_body(made), 201)


def metric_body(row: MetricRow) -> dict[str, Any]:
    """The wire form of a row."""
    return {
        "seq": row.seq,
        "step": row.step,
        "source": row.source,
        "kind": row.kind,
        "metrics": row.numbers,
        "created_at": rfc3339(row.created_at),
    }
