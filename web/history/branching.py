"""Runs that begin from another's state: at a place of its history, or from what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError

from schemas.errors import SignalError
from schemas.run_config import check_schedule
from web.context import services, user
from web.history.saved import check_fits
from web.history.span import place_to_begin, span_of
from web.operations.answering import own_saved
from web.runs.render import applied_seq
from web.runs.service import Draft
from web.runs.tables import RunRow
from workers.queue.records import Head

# What a branch may set anew; everything else shapes the state that it takes over.
OVERRIDES = ("learning_rate", "weight_decay", "lr_scheduler", "warmup_steps", "total_steps")
REPLAY_LABEL = "signal.replay-of"


def begin_from(request: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a run that begins from a saved state. Raises SignalError not_found, state_mismatch."""
    found = own_saved(request["run_id"], request["artifact"], "init_from.")
    model = services().catalogue.entry(config["base_model"])
    check_fits(found, config, model, optimizer=request["optimizer"])
    return {
        "run_id": found.run_id,
        "seq": int(found.manifest["seq"]),
        "artifact": found.key,
        "optimizer": request["optimizer"],
        "name": found.name,
        "sha256": found.sha256,
    }


def branch(run_id: str, row: RunRow, head: Head | None, request: Mapping[str, Any]) -> Draft:
    """The run `run_id` as a branch of another. Raises SignalError history_gone, validation_error."""
    span = span_of(services().journal, row, head)
    seq = place_to_begin(span, applied_seq(row, head), request["at_seq"])
    return Draft(
        run_id,
        user().id,
        row.base_model,
        _changed(row.config, request),
        request["name"],
        request["labels"],
        _origin(row, seq),
    )


def _changed(config: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a branch. Raises SignalError validation_error with the field's name."""
    changes = {name: request[name] for name in OVERRIDES if name in request}
    scheduler = changes.get("lr_scheduler", "")
    if scheduler in (None, "constant"):
        # What belongs to the parent's schedule goes with it.
        changes = {"warmup_steps": 0, "total_steps": None, **changes}
    elif scheduler == "constant_with_warmup":
        changes = {"total_steps": None, **changes}
    changed = {**config, **changes}
    try:
        check_schedule(changed)
    except ValidationError as error:
        text = str(error.messages[0])
        raise SignalError("validation_error", text, param=error.field_name) from error
    return changed


def replay(run_id: str, row: RunRow, head: Head | None) -> Draft:
    """A run that does another's kept history again. Raises SignalError history_gone."""
    span = span_of(services().journal, row, head)
    applied = applied_seq(row, head)
    seq = place_to_begin(span, applied, min(applied, span["to"]) if span else None)
    return Draft(
        run_id,
        user().id,
        row.base_model,
        row.config,
        labels={REPLAY_LABEL: row.run_id},
        origin={**_origin(row, seq), "from": "oldest"},
    )


def _origin(row: RunRow, seq: int) -> dict[str, Any]:
    settings = {name: row.config[name] for name in ("learning_rate", "weight_decay")}
    return {
        "run_id": row.run_id,
        "seq": seq,
        "artifact": None,
        "optimizer": True,
        "settings": settings,
    }
