"""Authentication: every path but the public ones needs `Authorization: Bearer <key>`, or below /api/v1, where
the Tinker SDK asks, `X-API-Key: tml-<key>`."""

from __future__ import annotations

from flask import Flask, g, request

from schemas.errors import SignalError
from web.accounts import keys
from web.accounts.service import User
from web.context import services

PUBLIC = ("/health", "/ready", "/openapi.json", "/docs", "/api/v1/healthz")
TINKER = "/api/v1/"
TINKER_MARK = "tml-"
# Addresses that are signed one by one.
SIGNED = "/api/v1/external_weights/"


def install(app: Flask) -> None:
    """Register the check; it also guards paths that do not exist."""
    app.before_request(_authenticate)


def is_public(path: str) -> bool:
    """Whether a path answers without a key."""
    return path in PUBLIC or path.startswith(("/docs/", SIGNED))


def _authenticate() -> None:
    if is_public(request.path):
        return
    key = tinker_key() if request.path.startswith(TINKER) else _bearer_key()
    g.user, g.key_id = _user_of(key), keys.public_id(key)


def _user_of(key: str) -> User:
    found = services().auth.user(key)
    if found is None:
        raise SignalError("unauthorized", "The API key is not valid.")
    return found


def tinker_key() -> str:
    """The SDK sends a key of ours behind the mark that it wants of every key."""
    key = request.headers.get("X-API-Key", "").strip()
    if not key.startswith(TINKER_MARK):
        text = f"Send the header X-API-Key: {TINKER_MARK}<API key of this server>."
        raise SignalError("unauthorized", text)
    return key.removeprefix(TINKER_MARK)


def _bearer_key() -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if not key:
        raise SignalError("unauthorized", "Send the header Authorization: Bearer <API key>.")
    if scheme.lower() != "bearer":
        raise SignalError("unauthorized", "Authorization must be of the form: Bearer <API key>.")
    return key.strip()
