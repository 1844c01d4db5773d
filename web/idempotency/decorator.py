"""`@idempotent`: makes a POST view that is not an operation honour its Idempotency-Key."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from flask import Response, g, request
from webargs.core import missing

from web.answers import raw_answer
from web.context import services, user
from web.idempotency.keys import REPLAYED, idempotency_key
from web.idempotency.service import IdempotencyKeys, request_digest
from web.parsing import json_body

F = TypeVar("F", bound=Callable[..., Response])


def idempotent(view: F) -> F:
    """The first success is stored and given again; a request that failed may be tried again."""

    @functools.wraps(view)
    def wrapper(*args: Any, **kwargs: Any) -> Response:
        key = idempotency_key()
        if key is None:
            return view(*args, **kwargs)
        return _answer_once(key, functools.partial(view, *args, **kwargs))

    return wrapper  # type: ignore[return-value]


def creation_token() -> str:
    """16 hex digits that name what this request makes: the same for a repeat under the same key."""
    return str(g.get("creation_token") or secrets.token_hex(8))


def _answer_once(key: str, view: Callable[[], Response]) -> Response:
    keys, who, body = IdempotencyKeys(services().db), user().id, json_body()
    digest = request_digest(request.method, request.path, {} if body is missing else body)
    about = (request.view_args or {}).get("run_id")
    claim = keys.claim(who, key, digest, about)
    if claim.answer is not None:
        status, stored = claim.answer
        return raw_answer(stored, status, {REPLAYED: "true"})
    g.creation_token = claim.token
    try:
        response = view()
    except BaseException:
        keys.give_back(who, key)
        raise
    keys.store(who, key, response.status_code, response.get_data())
    return response
