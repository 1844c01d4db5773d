"""POST /runs/{id}/{primitive} and its `_async` twin, and the journal: POST and GET /runs/{id}/operations."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView
from marshmallow import Schema, ValidationError

from schemas.operations import (
    KINDS,
    REQUESTS,
    OperationsQuery,
    OperationsRequest,
)
from schemas.results import RESULTS, Future, FutureList, OperationList
from web.answers import STREAM, encode, list_of, raw_answer
from web.context import services, user
from web.errors import validation_error
from web.futures.render import operation_body
from web.operations.answering import (
    RETRY_AFTER_S,
    answer_at_once,
    answer_when_done,
    append,
    futures,
    futures_of,
    target_of,
)
from web.operations.compile import Target, compile_operation, gather
from web.operations.streaming import stream
from web.parsing import Blueprint
from web.runs.facts import RunFacts
from workers.queue.records import Entry, NewEntry

blp = Blueprint("operations", __name__, description="The primitives, and the journal of a run.")

_SCHEMAS: dict[str, Schema] = {kind: request() for kind, request in REQUESTS.items()}
_ABOUT = {
    "forward_backward": "Compute a loss and accumulate its gradient",
    "forward": "Compute log-probabilities",
    "optim_step": "Take an optimizer step",
    "sample": "Sample from the current weights",
    "save_state": "Save the adapter",
    "load_state": "Go on from a saved state",
}
# Documented headers of answers.
FUTURE_ID = {
    "Signal-Future-Id": {"description": "The operation's future.", "schema": {"type": "string"}}
}
POLL = {
    "Location": {"description": "Path of the future.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds until a poll is worth it.",
        "schema": {"type": "integer"},
    },
}


_STREAM_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": ["future", "token", "restart", "result", "error"]},
        "data": {"type": "string", "description": "JSON."},
    },
    "required": ["event", "data"],
}
_STREAM_RESPONSES = {
    "responses": {
        200: {
            "description": "The tokens as they are sampled, then the answer.",
            "content": {STREAM: {"schema": _STREAM_EVENT}},
        }
    }
}


def _add(kind: str) -> None:
    """The two routes of a primitive."""

    class Sync(MethodView):
        @blp.arguments(_SCHEMAS[kind])
        @blp.response(200, RESULTS[kind], description="The result.", headers=FUTURE_ID)
        @blp.alt_response(
            202, schema=Future, headers=POLL, description="Not finished yet: poll the future."
        )
        @blp.doc(
            operationId=kind,
            summary=_ABOUT[kind],
            description="Waits for the result within a bound; past it the answer is 202 with the future.",
        )
        def post(self, request: dict[str, Any], run_id: str) -> Response:
            target = target_of(run_id)
            return answer_when_done(target.facts, compile_operation(kind, request, target))

    class Async(MethodView):
        @blp.arguments(_SCHEMAS[kind])
        @blp.response(
            202, Future, headers=POLL, description="The future, to be polled at `Location`."
        )
        @blp.doc(
            operationId=f"{kind}_async",
            summary=f"{_ABOUT[kind]}, without waiting",
            description="Answers as soon as the operation has its place in the journal.",
        )
        def post(self, request: dict[str, Any], run_id: str) -> Response:
            target = target_of(run_id)
            return answer_at_once(target.facts, compile_operation(kind, request, target))

    blp.route(f"/runs/<run_id>/{kind}", endpoint=kind)(Sync)
    blp.route(f"/runs/<run_id>/{kind}_async", endpoint=f"{kind}_async")(Async)


for _kind in KINDS:
    _add(_kind)


@blp.route("/runs/<run_id>/sample/stream")
class SampleStream(MethodView):
    """A sample whose tokens come while it runs."""

    @blp.arguments(_SCHEMAS["sample"])
    @blp.doc(operationId="sample_stream", **_STREAM_RESPONSES)
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Sample, token by token

        As `sample`, answered as Server-Sent Events: `future` at once, a `token` for each token of each
        sample, then `result` with the answer of `sample`, or `error`. `restart` says that a worker was
        lost: the tokens so far are void and come again. After 15 minutes the stream ends with `future`,
        and the operation goes on. Hanging up cancels it.
        """
        target = target_of(run_id)
        entry = compile_operation("sample", {**request, "stream": True}, target)
        return stream(target.facts, entry)


@blp.route("/runs/<run_id>/operations")
class OperationsView(MethodView):
    """The journal of a run."""

    @blp.arguments(OperationsRequest)
    @blp.response(202, FutureList, description="The futures, in the order of the operations.")
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Submit several operations

        They take effect in the given order, with nothing in between. All are appended or none.
        """
        target = target_of(run_id)
        entries = _compile_many(request["operations"], target)
        appended, headers = append(target.facts, entries)
        body = list_of(futures_of(target.facts, entries, appended))
        return raw_answer(body, 202, {**headers, "Retry-After": str(RETRY_AFTER_S)})

    @blp.arguments(OperationsQuery, location="query")
    @blp.response(200, OperationList, description="Finished operations, in order.")
    def get(self, query: dict[str, Any], run_id: str) -> Response:
        """Read the journal

        Everything that has finished after `after_seq`, in order, without the results. With `wait` the
        answer is held until there is something: one long poll follows a whole pipeline.
        """
        s, facts = services(), services().facts.get(run_id, user().id)
        after, limit = query["after_seq"], query["limit"]

        def look() -> list[Entry]:
            return s.journal.finished_after(run_id, after, limit + 1)

        if query["wait"] > 0:
            with s.long_poll():
                found = futures().wait_run(run_id, min(query["wait"], s.settings.max_poll_s), look)
        else:
            found = look()
        return _journal_page(facts, found, after, limit)


def _journal_page(facts: RunFacts, found: list[Entry], after: int, limit: int) -> Response:
    s, page = services(), found[:limit]
    head = s.journal.head(facts.run_id)
    rows = [operation_body(s.settings, entry) for entry in page]
    return raw_answer(
        list_of(
            [encode(row) for row in rows],
            has_more=len(found) > limit,
            next_seq=page[-1].seq if page else after,
            applied_seq=head.applied if head else after,
        )
    )


def _compile_many(items: list[Any], target: Target) -> list[NewEntry]:
    requests = _load_many(items)

    def one(index: int) -> NewEntry:
        kind, request = requests[index]
        return compile_operation(kind, request, target, f"operations.{index}.")

    return gather(one, len(requests))


def _load_many(items: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    out: list[tuple[str, dict[str, Any]]] = []
    wrong: dict[int, Any] = {}
    for index, item in enumerate(items):
        try:
            out.append(_load_one(item))
        except ValidationError as error:
            wrong[index] = error.messages
    if wrong:
        raise validation_error({"operations": wrong})
    return out


def _load_one(item: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(item, dict):
        raise ValidationError(["An object with `kind` and the fields of that call is needed."])
    kind = item.get("kind")
    if not isinstance(kind, str) or kind not in _SCHEMAS:
        raise ValidationError({"kind": [f"One of {', '.join(KINDS)} is needed."]})
    fields = {name: value for name, value in item.items() if name != "kind"}
    return kind, _SCHEMAS[kind].load(fields)
