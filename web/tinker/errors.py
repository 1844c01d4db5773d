"""Errors as the SDK takes them: JSON, and never a status that it would try again for what will not change.

It repeats 408, 409, 429 and everything from 500 on, for minutes or without end.
"""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, Response, g, request

from schemas.errors import SignalError
from web.admission import end_work
from web.answers import json_answer
from web.context import services
from web.errors import as_signal_error, extra_headers, handle
from web.middleware import request_id

POLL = "tinker.retrieve_future"
_STABLE = {409: 400, 424: 400, 408: 400}
# What tells the SDK to send less at once, and how it is told so.
_BACKPRESSURE = {"overloaded": 429}


def status_of(error: SignalError) -> int:
    """The HTTP status of an error in this protocol."""
    if error.row.retryable:
        return _BACKPRESSURE.get(error.code, error.status)
    return _STABLE.get(error.status, error.status)


def body_of(error: SignalError) -> dict[str, Any]:
    """`detail` is what the SDK's commands print; `code` and the rest are for programs."""
    known = error.to_dict()
    where = f"{error.param}: " if error.param else ""
    return {"detail": f"{where}{error.message}", **known, "request_id": request_id()}


def install(blueprint: Blueprint) -> None:
    """Answer every failure of this blueprint's requests so."""
    blueprint.before_request(_begin)
    blueprint.register_error_handler(Exception, answer)


def _begin() -> None:
    g.began_at = time.monotonic()


def _hold() -> None:
    """Until the poll is as old as it is to be: what it asked first has taken its time to time out."""
    now = time.monotonic()
    # A request whose key could not be looked up never came to the blueprint.
    age = now - g.get("began_at", now)
    time.sleep(max(0.0, services().settings.outage_hold_s - age))


def answer(error: Exception) -> Response:
    """The answer to a request that failed."""
    known = as_signal_error(error)
    if known.status >= 500:
        handle(error)  # for the log
    status = status_of(known)
    if request.endpoint == POLL and status >= 500:
        # After a 5xx the SDK asks again at once, and after a 429 it waits by itself.
        end_work()
        _hold()
        status = 429
    headers = extra_headers(error)
    if known.retry_after_s is not None:
        headers["Retry-After"] = str(known.retry_after_s)
    return json_answer(body_of(known), status, headers)
