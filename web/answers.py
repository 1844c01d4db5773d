"""Bodies of answers: strict JSON, results spliced in as the bytes that the worker stored, times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from flask import Response

STREAM = "text/event-stream"


def encode(body: Any) -> bytes:
    """Strict JSON: NaN and infinity are a defect of ours, never an answer."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def json_answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer from a Python value."""
    return raw_answer(encode(body), status, headers)


def raw_answer(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer from bytes that are JSON already."""
    return Response(body, status, headers, mimetype="application/json")


def event_stream(
    lines: Iterator[bytes], place: ExitStack, headers: Mapping[str, str] | None = None
) -> Response:
    """Server-Sent Events; `place` is given back when the stream ends, however it does."""
    response = Response(lines, 200, headers, mimetype=STREAM)
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(place.close)
    return response


def splice(body: Mapping[str, Any], key: str, raw: bytes | None) -> bytes:
    """`body` as JSON with `key` added, whose value is JSON already; None becomes null."""
    return encode(body)[:-1] + f',"{key}":'.encode() + (raw or b"null") + b"}"


def list_of(items: Iterable[bytes], **fields: Any) -> bytes:
    """`{"object": "list", …, "data": […]}` from items that are JSON already."""
    head = encode({"object": "list", **fields})[:-1]
    return head + b',"data":[' + b",".join(items) + b"]}"


def rfc3339(at: float | datetime | None) -> str | None:
    """A time on the wire, from epoch seconds or an aware datetime."""
    if at is None:
        return None
    moment = datetime.fromtimestamp(at, UTC) if isinstance(at, int | float) else at.astimezone(UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
