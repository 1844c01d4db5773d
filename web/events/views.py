"""GET /runs/{id}/events: a list, a long poll, or a stream of Server-Sent Events."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

from flask import Response, request
from flask.views import MethodView

from schemas.errors import Detail, SignalError, raise_all
from schemas.events import EventsQuery, RunEventList
from web.answers import STREAM, event_stream, json_answer
from web.context import services, user
from web.events import service
from web.events.service import Page, event_body
from web.events.stream import stream
from web.parsing import Blueprint
from web.runs.facts import NO_RUN

blp = Blueprint("events", __name__, description="What happens to a run.")

RESUME = "Last-Event-ID"
_PAGE = 100
_GREATEST = 2**53
_JSON_ONLY = ("wait", "limit")
_DOCUMENTED = {"responses": {200: {"content": {STREAM: {"schema": {"type": "string"}}}}}}


@blp.route("/runs/<run_id>/events")
class EventsView(MethodView):
    """What happened to a run beside its operations."""

    @blp.arguments(EventsQuery, location="query")
    @blp.response(200, RunEventList, description="Events in order; or a stream of them.")
    @blp.alt_response(
        204, description="Of a stream: the run has ended, and nothing comes any more."
    )
    @blp.doc(**_DOCUMENTED)
    def get(self, query: dict[str, Any], run_id: str) -> Response:
        """Read a run's events

        Everything after the event `after`, in order. With `wait` the answer is held until there is
        something. Asked for `text/event-stream`, the same events come as Server-Sent Events as they
        happen: for five minutes at most, then a client comes again with the last id that it has.
        """
        services().facts.get(run_id, user().id)
        after = max(query["after"], _last_received())
        if _wants_stream():
            return _stream(run_id, after)
        seconds = min(query["wait"], services().settings.max_poll_s)
        if seconds > 0:
            with services().long_poll():
                found = service.wait(
                    services().hub, run_id, seconds, lambda: _page(run_id, after, query["limit"])
                )
        else:
            found = _page(run_id, after, query["limit"])
        return json_answer(_body(found, after))


def _body(found: Page, after: int) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [event_body(row) for row in found.events],
        "has_more": found.more,
        "next_after": found.events[-1].id if found.events else after,
        "ended": found.ended,
    }


def _page(run_id: str, after: int, limit: int) -> Page:
    found = service.page(services().db, run_id, after, limit)
    if found is None:
        raise SignalError("not_found", NO_RUN)
    return found


def _stream(run_id: str, after: int) -> Response:
    raise_all(
        Detail(name, "validation_error", "A stream takes no such field: it sends what comes.")
        for name in _JSON_ONLY
        if name in request.args
    )
    s = services()
    first = _page(run_id, after, 1)
    if first.ended and not first.events:
        # A browser comes again for ever after an empty stream; after this it does not.
        return Response(status=204)
    # The place is held as long as the stream is, and given back however that ends.
    place = ExitStack()
    place.enter_context(s.long_poll())
    lines = stream(s.hub, run_id, after, lambda last: service.page(s.db, run_id, last, _PAGE))
    return event_stream(lines, place)


def _wants_stream() -> bool:
    accepted = request.accept_mimetypes
    return accepted.best_match(["application/json", STREAM]) == STREAM


def _last_received() -> int:
    text = request.headers.get(RESUME, "")
    if not text:
        return 0
    if not re.fullmatch("[0-9]{1,16}", text) or int(text) > _GREATEST:
        raise SignalError("validation_error", "Not the id of an event.", param=RESUME)
    return int(text)
