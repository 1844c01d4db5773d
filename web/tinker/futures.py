"""Futures of the SDK: the native future's id, waited for and rendered in the form that its kind has here."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Response

from schemas.errors import SignalError
from web.admission import end_work
from web.answers import json_answer
from web.context import services
from web.futures.views import own_ref
from web.operations.answering import futures
from web.tinker import checkpoints, models, outputs
from web.tinker.samplers import model_of
from web.tinker.sampling import LAST_N
from web.tinker.tables import EXTERNAL, LIVE, SAMPLER, TRAINING
from workers.queue.records import Entry

PROTOBUF = "application/x-protobuf"
# Requests that were done when they were answered: their id says what is to be said of them.
MADE, LOADED = "made:", "loaded:"


def retrieve(request_id: str) -> Response:
    """The result, held for as long as a poll may be; 408 when it is not there by then.

    Raises SignalError not_found, future_expired, too_many_waits.
    """
    for prefix in (MADE, LOADED):
        if request_id.startswith(prefix):
            return json_answer(_made(prefix, request_id.removeprefix(prefix)))
    text, _, last_n = request_id.partition(LAST_N)
    ref = own_ref(text)
    # A poll has a body, and must not keep others from theirs while it waits, nor while Redis is away.
    end_work()
    # Only who waits needs a place for it: hundreds of results that are there may be read at once.
    entry = futures().wait(ref, services().settings.max_poll_s, services().long_poll)
    if not entry.finished:
        return _pending(request_id, entry)
    return _finished(entry, int(last_n) if last_n.isdigit() else None)


def cancel(request_id: str) -> None:
    """Nobody waits for it any more. Raises SignalError not_found."""
    ref = own_ref(request_id.partition(LAST_N)[0])
    if not futures().entry(ref).finished:
        services().journal.cancel(ref.run_id, ref.entry)


def _made(prefix: str, model_id: str) -> dict[str, Any]:
    row = models.own(model_id)
    if prefix == MADE:
        return {"type": "create_model", "model_id": row.model_id}
    return {"type": "load_weights", "model_id": row.model_id, "path": row.loaded_from}


def _pending(request_id: str, entry: Entry) -> Response:
    """Where it stands: the queue's state, and in words what it waits for."""
    head = services().journal.head(entry.run_id)
    state, reason = "active", None
    if head is not None and head.hold:
        state, reason = "paused_capacity", f"the run is held ({head.hold})"
    elif head is not None and not head.worker:
        state, reason = "paused_capacity", "the model waits for a device"
    elif entry.status == "pending" and entry.seq is None and not entry.free:
        reason = "an earlier request of the model has not arrived"
    elif entry.status == "pending":
        reason = f"{_ahead(entry, head.applied if head else 0)} requests are before it"
    body = {"type": "try_again", "request_id": request_id, "queue_state": state}
    return json_answer({**body, "queue_state_reason": reason}, 408)


def _ahead(entry: Entry, applied: int) -> int:
    if entry.seq is not None:
        return max(0, entry.seq - applied - 1)
    return services().journal.positions([entry]).get((entry.run_id, entry.number), 0)


def _finished(entry: Entry, last_n: int | None) -> Response:
    if entry.status != "completed":
        return json_answer(outputs.failure(entry.error or {"code": entry.status}))
    raw = services().journal.result(entry)
    if raw is None:
        raise SignalError("future_expired")
    result = orjson.loads(raw)
    if entry.kind in ("forward_backward", "forward"):
        return Response(outputs.loss_output(result), mimetype=PROTOBUF)
    if entry.kind == "sample":
        return Response(outputs.sample_output(result, last_n), mimetype=PROTOBUF)
    return json_answer(_RENDER[entry.kind](entry, result))


def _step(entry: Entry, result: dict[str, Any]) -> dict[str, Any]:
    return outputs.step_output(result)


def _saved(entry: Entry, result: dict[str, Any]) -> dict[str, Any]:
    found = checkpoints.of_artifact(services().db, entry.run_id, result["name"])
    if found is None:
        raise SignalError("future_expired")
    if found.row.kind == LIVE:
        return {"type": "save_weights_for_sampler", "sampling_session_id": found.row.sampler_id}
    names = {
        TRAINING: "save_weights",
        SAMPLER: "save_weights_for_sampler",
        EXTERNAL: "save_weights_external",
    }
    size = {"size_bytes": result["size_bytes"]} if found.row.kind == EXTERNAL else {}
    return {"type": names[found.row.kind], "path": found.path, **size}


def _loaded(entry: Entry, result: dict[str, Any]) -> dict[str, Any]:
    model = model_of(entry.run_id)
    return {"type": "load_weights", "model_id": model.model_id if model else None}


def _other(entry: Entry, result: dict[str, Any]) -> dict[str, Any]:
    return {}


_RENDER = {
    "optim_step": _step,
    "save_state": _saved,
    "load_state": _loaded,
    "certificate": _other,
    "complete": _other,
}
