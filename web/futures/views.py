"""GET /futures/{id}, GET /futures, DELETE /futures/{id}."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.errors import Detail, SignalError, raise_all
from schemas.futures import MAX_IDS, FutureCancelled, FutureQuery, FuturesQuery
from schemas.results import Future, FutureList
from web.answers import json_answer, list_of, raw_answer
from web.context import services, user
from web.futures.service import FutureRef
from web.operations.answering import futures
from web.parsing import Blueprint

blp = Blueprint("futures", __name__, description="The results of operations.")


def own_ref(text: str) -> FutureRef:
    """A future of the caller's. Raises SignalError not_found for anybody else's."""
    ref = futures().parse(text)
    try:
        services().facts.get(ref.run_id, user().id)
    except SignalError:
        raise SignalError("not_found", "There is no such future, or it is not yours.") from None
    return ref


@blp.route("/futures/<future_id>")
class FutureView(MethodView):
    """One future."""

    @blp.arguments(FutureQuery, location="query")
    @blp.response(200, Future, description="The operation, finished or not.")
    def get(self, query: dict[str, Any], future_id: str) -> Response:
        """Read a future

        With `wait` the answer is held until the operation has ended or the time is over.
        """
        ref = own_ref(future_id)
        if query["wait"] > 0:
            seconds = min(query["wait"], services().settings.max_poll_s)
            entry = futures().wait(ref, seconds, services().long_poll)
        else:
            entry = futures().entry(ref)
        return raw_answer(futures().render_one(ref, entry))

    @blp.response(200, FutureCancelled, description="Cancelled, or a sample that is stopping.")
    def delete(self, future_id: str) -> Response:
        """Cancel an operation

        A queued operation is skipped in its place; a running sample ends at its next token; any other
        running operation cannot be stopped (409 already_running). Cancelling what was cancelled is no error.
        """
        ref = own_ref(future_id)
        outcome = "finished"
        if not futures().entry(ref).finished:
            outcome = services().journal.cancel(ref.run_id, ref.entry)
        if outcome not in ("cancelled", "stopping"):
            outcome = _refused(ref, outcome)
        return json_answer({"future_id": future_id, "status": outcome})


def _refused(ref: FutureRef, outcome: str) -> str:
    entry = futures().entry(ref)
    if entry.status == "cancelled":
        return "cancelled"
    if outcome == "finished":
        raise SignalError("already_running", f"The operation has ended: it is {entry.status}.")
    raise SignalError("already_running")


@blp.route("/futures")
class FuturesView(MethodView):
    """Several futures."""

    @blp.arguments(FuturesQuery, location="query")
    @blp.response(200, FutureList, description="The operations, in the order of `ids`.")
    def get(self, query: dict[str, Any]) -> Response:
        """Read several futures

        With `wait` the answer is held until all (or, with `until=any`, one) of them have ended.
        """
        refs = _refs(query["ids"])
        seconds = min(query["wait"], services().settings.max_poll_s)
        if seconds > 0:
            wait = futures().wait_any if query["until"] == "any" else futures().wait_all
            with services().long_poll():
                entries = wait(refs, seconds)
        else:
            entries = futures().entries(refs)
        return raw_answer(list_of(futures().render(refs, entries)))


def _refs(text: str) -> list[FutureRef]:
    ids = text.split(",")
    if len(ids) > MAX_IDS:
        raise_all([Detail("ids", "validation_error", f"At most {MAX_IDS} future ids at once.")])
    return [own_ref(one.strip()) for one in ids]
