"""Headers of every answer: the request's id and the server's version."""

from __future__ import annotations

import re
import secrets

from flask import Flask, Response, g, request

from web.version import VERSION

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def install(app: Flask) -> None:
    """Register the hooks; the first to run before a request and the last after it."""
    app.before_request(_begin)
    app.after_request(_finish)


def request_id() -> str:
    """The id of the current request: the client's if it is sane, else one of ours."""
    if "request_id" not in g:
        sent = request.headers.get("X-Request-Id", "")
        g.request_id = sent if _SANE.fullmatch(sent) else f"req_{secrets.token_hex(8)}"
    return str(g.request_id)


def _begin() -> None:
    request_id()


def _finish(response: Response) -> Response:
    response.headers["X-Request-Id"] = request_id()
    response.headers["Signal-Version"] = VERSION
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")
    return response
