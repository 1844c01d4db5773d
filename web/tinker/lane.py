"""Operations of a model's lane: executed strictly by `seq_id`, in whatever order they arrive.

What is refused takes its place all the same and fails there, so that nothing behind it waits for it: the SDK
counts on. A repeat gets the first answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from flask import Response

from schemas.errors import SignalError
from web.answers import json_answer
from web.context import services
from web.operations.answering import append
from web.operations.compile import Compiled, Target
from workers.queue.futures import future_id
from workers.queue.records import Appended, NewEntry

LANE = "tinker"
# A failed step is seen by who sent it; the loop goes on with the next.
_ON_ERROR = "continue"


def submit(
    target: Target, seq_id: int, kind: str, compile_: Callable[[], Compiled], identity: str = ""
) -> Response:
    """Append an operation and answer with its future; what `compile_` refuses is its outcome.

    `identity` tells the request from others under its seq_id; left out, what it was compiled to does.
    """
    try:
        compiled = compile_()
        entry = _entry(kind, seq_id, compiled, identity or _hash(kind, compiled.body))
    except SignalError as error:
        if error.row.retryable:
            raise
        refused = json.dumps(error.to_dict())
        empty = Compiled(b"\x80")
        entry = _entry(kind, seq_id, empty, identity or _hash(kind, refused.encode()), refused)
    (appended,), _ = append(target.facts, [entry])
    return json_answer(future(target, appended))


def _entry(kind: str, seq_id: int, compiled: Compiled, digest: str, refused: str = "") -> NewEntry:
    return NewEntry(
        kind=kind,
        body=compiled.body,
        tokens=compiled.tokens,
        lane=LANE,
        client_seq=seq_id,
        on_error=_ON_ERROR,
        digest=digest,
        refused=refused,
    )


def _hash(kind: str, body: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"|" + body).hexdigest()


def future(target: Target, appended: Appended) -> dict[str, Any]:
    """What a submission answers."""
    run_id = target.facts.run_id
    where = future_id(services().settings, run_id, appended.entry, appended.tag)
    return {"request_id": where}
