"""Turns every failure of a request into the one error shape of the API.

SignalError keeps its words; what our libraries raise is mapped to a code of the table; anything else is
`internal_error`, logged with the request's id and never shown.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import Any

import kombu.exceptions
import sqlalchemy.exc
from flask import Flask, Response, request
from flask_smorest import Api
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestedRangeNotSatisfiable

from schemas.errors import Detail, SignalError
from schemas.service import ErrorEnvelope
from web.answers import json_answer
from web.middleware import request_id
from workers.storage import StorageAway

log = logging.getLogger(__name__)

MAX_DETAILS = 100
_HTTP_CODES = {
    404: ("not_found", "There is no such path."),
    405: ("method_not_allowed", None),
    406: ("not_acceptable", None),
    413: ("payload_too_large", None),
    415: ("unsupported_media_type", None),
    416: ("range_not_satisfiable", None),
}


class SignalApi(Api):  # type: ignore[misc]
    """flask-smorest's Api with our errors instead of its own."""

    ERROR_SCHEMA = ErrorEnvelope

    def _register_error_handlers(self) -> None:
        app: Flask = self._app
        app.register_error_handler(Exception, handle)


def handle(error: Exception) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, HTTPException) and error.code is not None and error.code < 400:
        return error.get_response()  # type: ignore[return-value]
    known = as_signal_error(error)
    where = (request.method, request.path, known.code, request_id())
    if known.code == "internal_error":
        log.error("%s %s failed (%s, %s)", *where, exc_info=error)
    elif known.status >= 500:
        log.warning("%s %s failed (%s, %s): %s", *where, error)
    return error_answer(known, extra_headers(error))


def error_answer(error: SignalError, headers: dict[str, str] | None = None) -> Response:
    """The one error shape."""
    out = dict(headers or {})
    if error.retry_after_s is not None:
        out["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    body = {**error.to_dict(), "request_id": request_id()}
    if error.param is not None and not error.details:
        body["details"] = [Detail(error.param, error.code, error.message).to_dict()]
    return json_answer({"error": body}, error.status, out)


def as_signal_error(error: BaseException) -> SignalError:
    """The error of the table that says what happened."""
    if isinstance(error, SignalError):
        return error
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, RedisError):
        return _from_redis(error)
    if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        return _from_sql(error)
    if isinstance(error, kombu.exceptions.OperationalError | StorageAway):
        return SignalError("unavailable")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SignalError("storage_full")
    return SignalError("internal_error")


def _from_http(error: HTTPException) -> SignalError:
    status = error.code or 500
    if status >= 500:
        return SignalError("internal_error")
    code, message = _HTTP_CODES.get(status, ("bad_request", error.description))
    return SignalError(code, message)


def _from_redis(error: RedisError) -> SignalError:
    text = str(error)
    if isinstance(error, ResponseError) and ("MISCONF" in text or "No space left" in text):
        return SignalError("storage_full")
    if isinstance(error, RedisConnectionError | RedisTimeoutError | OutOfMemoryError):
        return SignalError("unavailable")
    if text.startswith(("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "OOM")):
        return SignalError("unavailable")
    return SignalError("internal_error")


def _from_sql(error: sqlalchemy.exc.SQLAlchemyError) -> SignalError:
    text = str(getattr(error, "orig", "") or "")
    if "disk is full" in text or "No space left" in text:
        return SignalError("storage_full")
    outages = (
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.TimeoutError,
    )
    if isinstance(error, outages) or getattr(error, "connection_invalidated", False):
        return SignalError("unavailable")
    return SignalError("internal_error")


def extra_headers(error: BaseException) -> dict[str, str]:
    """Headers that belong to a status: `Allow` on 405, `Content-Range` on 416."""
    if isinstance(error, MethodNotAllowed):
        return {"Allow": ", ".join(sorted(error.valid_methods or ()))}
    if isinstance(error, RequestedRangeNotSatisfiable) and error.length is not None:
        return {"Content-Range": f"bytes */{error.length}"}
    return {}


def validation_error(messages: Any) -> SignalError:
    """One error that names every wrong field, from marshmallow's nested messages."""
    found = list(flatten(messages))
    first = found[0] if found else Detail(None, "validation_error", "The request is not valid.")
    codes = {detail.code for detail in found}
    code = first.code if len(codes) == 1 else "validation_error"
    where = f"{first.param}: {first.message}" if first.param else first.message
    text = where if len(found) == 1 else f"{len(found)} fields are wrong, the first: {where}"
    return SignalError(code, text, param=first.param, details=found[:MAX_DETAILS])


def flatten(messages: Any, path: tuple[str, ...] = ()) -> Iterator[Detail]:
    """`{"a": {0: {"b": ["text"]}}}` becomes the detail `a.0.b: text`."""
    if isinstance(messages, dict):
        for key, value in messages.items():
            yield from flatten(value, path if key == "_schema" else (*path, str(key)))
    elif isinstance(messages, list):
        for value in messages:
            yield from flatten(value, path)
    else:
        # A message may carry a code of the table of its own.
        code = getattr(messages, "code", "validation_error")
        yield Detail(".".join(path) or None, code, str(messages))
