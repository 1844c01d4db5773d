"""Authentication: every path but the public ones needs `Authorization: Bearer <key>`."""

from __future__ import annotations

from flask import Flask, g, request

from schemas.errors import SignalError
from web.accounts import keys
from web.context import services

PUBLIC = ("/health", "/ready", "/openapi.json", "/docs")


def install(app: Flask) -> None:
    """Register the check; it also guards paths that do not exist."""
    app.before_request(_authenticate)


def is_public(path: str) -> bool:
    """Whether a path answers without a key."""
    return path in PUBLIC or path.startswith("/docs/")


def _authenticate() -> None:
    if is_public(request.path):
        return
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if not key:
        raise SignalError("unauthorized", "Send the header Authorization: Bearer <API key>.")
    if scheme.lower() != "bearer":
        raise SignalError("unauthorized", "Authorization must be of the form: Bearer <API key>.")
    found = services().auth.user(key.strip())
    if found is None:
        raise SignalError("unauthorized", "The API key is not valid.")
    g.user, g.key_id = found, keys.public_id(key.strip())
