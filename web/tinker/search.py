"""Which sessions a search finds. Pure but for the rows that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from marshmallow import fields, validate

from schemas.fields import StrictInteger
from web.tinker.requests import Request
from web.tinker.rest import status_of, texts
from web.tinker.tables import SessionRow


class Search(Request):
    """POST sessions/search."""

    session_id = fields.String(load_default=None, allow_none=True)
    project_ids = fields.List(fields.String(), load_default=None, allow_none=True)
    user_metadata = fields.Dict(load_default=dict)
    display_name = fields.String(load_default=None, allow_none=True)
    owner = fields.Dict(load_default=lambda: {"type": "own"})
    statuses = fields.List(fields.Dict(), load_default=None, allow_none=True)
    limit = StrictInteger(load_default=50, validate=validate.Range(1, 200))
    cursor = fields.Dict(load_default=None, allow_none=True)


def matches(row: SessionRow, request: Mapping[str, Any]) -> bool:
    """Whether a session is what is searched for."""
    about = row.about
    named = [
        test
        for test, asked in (
            (row.session_id == request["session_id"], request["session_id"]),
            (
                _has_words(about.get("display_name"), request["display_name"]),
                request["display_name"],
            ),
        )
        if asked
    ]
    projects = request["project_ids"]
    metadata = texts(about.get("user_metadata")) or {}
    return (
        (not named or any(named))
        and (projects is None or (about.get("project_id") or "default") in projects)
        and all(metadata.get(name) == value for name, value in request["user_metadata"].items())
        and (request["statuses"] is None or any(_is(row, one) for one in request["statuses"]))
        and _is_after(row, request["cursor"])
    )


def _has_words(name: str | None, wanted: str | None) -> bool:
    return bool(name and wanted) and all(
        word in str(name).lower() for word in str(wanted).lower().split()
    )


def _is(row: SessionRow, wanted: Mapping[str, Any]) -> bool:
    status = status_of(row)
    if status is None or status["type"] != wanted.get("type"):
        return False
    reasons = wanted.get("reasons")
    return not reasons or status["reason"]["type"] in reasons


def _is_after(row: SessionRow, cursor: Mapping[str, Any] | None) -> bool:
    """Whether it comes behind a page's last, newest first."""
    if cursor is None:
        return True
    at = datetime.fromisoformat(str(cursor.get("last_created_at")).replace("Z", "+00:00"))
    at_ms, own_ms = (int(moment.timestamp() * 1000) for moment in (at, row.created_at))
    return (own_ms, row.session_id) < (at_ms, str(cursor.get("last_session_id")))
