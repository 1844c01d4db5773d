"""Reading requests: strict JSON, and query parameters of which none is ignored.

NaN and infinity pass the reader as numbers so that the field that holds one can be named: every number
field of `schemas` refuses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

import marshmallow
import orjson
from flask import Request, current_app, g, request
from flask_smorest import Blueprint as SmorestBlueprint
from webargs.core import missing
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import ClientDisconnected

from schemas.errors import SignalError
from web.admission import SMALL_BYTES
from web.context import services
from web.errors import validation_error

_STALLED_S = 30.0
_DRAIN_BYTES, _DRAIN_BLOCKS = 64 * 1024, 1024


class Parser(FlaskParser):
    """webargs with our errors and our JSON."""

    DEFAULT_UNKNOWN_BY_LOCATION = {
        **FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION,
        "query": marshmallow.RAISE,
    }

    def _raw_load_json(self, req: Request) -> Any:
        return json_body()

    def handle_error(
        self, error: marshmallow.ValidationError, req: Request, schema: Any, **kwargs: Any
    ) -> NoReturn:
        """The messages come under the name of their location, which is not part of a field's path."""
        messages = error.messages
        if isinstance(messages, dict) and len(messages) == 1:
            messages = next(iter(messages.values()))
        raise validation_error(messages) from None


class Blueprint(SmorestBlueprint):  # type: ignore[misc]
    """flask-smorest's Blueprint, reading requests with `Parser`."""

    ARGUMENTS_PARSER = Parser()

    def arguments(self, schema: Any, *, location: str = "json", **kwargs: Any) -> Any:
        """As flask-smorest's; marks the views that take query parameters."""
        decorate = super().arguments(schema, location=location, **kwargs)

        def decorator(view: Any) -> Any:
            decorated = decorate(view)
            decorated.takes_query = location == "query" or getattr(view, "takes_query", False)
            return decorated

        return decorator


def refuse_query() -> None:
    """A view that takes no query parameters refuses them all: none is ignored."""
    view = current_app.view_functions.get(request.endpoint or "")
    views = getattr(view, "view_class", None)
    if request.args and views is not None:
        method = getattr(views, request.method.lower(), None)
        if not getattr(method, "takes_query", False):
            raise validation_error({name: ["Unknown field."] for name in request.args})


def raw_body(media_type: str) -> bytes:
    """The request's body as it is, which must be of this media type. Raises SignalError."""
    if request.mimetype != media_type:
        text = f"The body must be sent as {media_type}."
        raise SignalError("unsupported_media_type", text)
    data = _received()
    services().admission.take_turn()
    return data


def json_body() -> Any:
    """The request's JSON, read once; `missing` when there is no body."""
    if "json_body" not in g:
        g.json_body = _read_body()
    return g.json_body


def _read_body() -> Any:
    kind = request.mimetype
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise SignalError("unsupported_media_type")
    data = _received()
    if not data:
        return missing
    if not kind:
        raise SignalError("unsupported_media_type")
    services().admission.take_turn()
    return parse(data)


def _received() -> bytes:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise SignalError("unsupported_media_type", "A compressed body is not supported.")
    with _patience():
        return _read_sized() if request.content_length is not None else _read_chunked()


@contextmanager
def _patience() -> Iterator[None]:
    """A client that stops in the middle of its body holds a thread and memory, so not for ever."""
    sock = request.environ.get("gunicorn.socket")
    if sock is not None:
        sock.settimeout(_STALLED_S)
    try:
        yield
    except (ClientDisconnected, TimeoutError):
        raise SignalError(
            "bad_request",
            "The body ended before its Content-Length, or nothing of it came for "
            f"{_STALLED_S:g} seconds.",
        ) from None
    finally:
        if sock is not None:
            sock.settimeout(None)


def _read_sized() -> bytes:
    """A body of known length; one over the limit is refused before it is read."""
    size = request.content_length or 0
    if size <= (request.max_content_length or 0):
        try:
            services().admission.take_body(size)
        except SignalError:
            _read_away(request.environ["wsgi.input"])
            raise
    # Not kept by the request: its memory goes as soon as it is parsed.
    return request.get_data(cache=False)


def _read_chunked() -> bytes:
    """A body of unknown length. werkzeug would cut it at the limit without a word."""
    if not request.environ.get("wsgi.input_terminated"):
        # Without a length and without an end there is no body.
        return b""
    limit = request.max_content_length or 0
    stream: BinaryIO = request.environ["wsgi.input"]
    data = stream.read(min(SMALL_BYTES, limit + 1))
    if len(data) == SMALL_BYTES:
        try:
            services().admission.take_body(limit)
        except SignalError:
            _read_away(stream)
            raise
        data += stream.read(limit + 1 - SMALL_BYTES)
    if len(data) <= limit:
        return data
    _read_away(stream)
    raise SignalError("payload_too_large")


def _read_away(stream: BinaryIO) -> None:
    """Of a body that is refused, so that a client that is still sending gets the answer."""
    for _ in range(_DRAIN_BLOCKS):
        if not stream.read(_DRAIN_BYTES):
            break


def parse(data: bytes) -> Any:
    """JSON from UTF-8. Raises SignalError malformed_json."""
    try:
        if len(data) > SMALL_BYTES:
            # A third of the time; what it refuses is read again by the one that can say why.
            with suppress(orjson.JSONDecodeError):
                return orjson.loads(data)
        value = json.loads(data.decode())
        if b"\\ud" in data.lower():
            # Half of a surrogate pair is no character: it could be neither stored nor tokenized.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SignalError(
            "malformed_json", f"The body is not valid JSON: {_reason(error)}"
        ) from None
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}."
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}."
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair in a text."
    if isinstance(error, RecursionError):
        return "nested too deeply."
    return "a number has too many digits."
