"""Runs: what creates one, and what is said of one."""

from __future__ import annotations

from typing import Any

from marshmallow import fields, validate

from schemas.fields import FiniteFloat, Input, Labels, Output, StrictBoolean, StrictInteger, rfc3339
from schemas.history import (
    Determinism,
    InitFrom,
    JournalSize,
    RunHold,
    RunParent,
    RunSnapshot,
)
from schemas.run_config import SCHEDULERS, RunConfig

RUN_STATUSES = (
    "queued",
    "loading",
    "rebuilding",
    "ready",
    "pausing",
    "paused",
    "rolled_back",
    "completed",
    "cancelled",
    "failed",
)
CLOSED_STATUSES = ("completed", "cancelled", "failed")


class Named(Input):
    """A run's name and labels."""

    name = fields.String(
        load_default=None,
        allow_none=True,
        validate=[validate.Length(1, 200), validate.ContainsNoneOf("\x00")],
    )
    labels = Labels(load_default=dict)


class RunCreate(RunConfig, Named):
    """POST /runs: the configuration with a name and labels."""

    init_from = fields.Nested(
        InitFrom,
        load_default=None,
        allow_none=True,
        metadata={"description": "Begin from a saved state of your own instead of from nothing."},
    )


class BranchRequest(Named):
    """POST /runs/{id}/branch. What is left out stays as it is in the run."""

    at_seq = StrictInteger(
        load_default=None,
        allow_none=True,
        validate=validate.Range(0, 2**53),
        metadata={
            "description": "Begin from the state after this operation; null means the newest."
        },
    )
    learning_rate = FiniteFloat(validate=validate.Range(0, 1, min_inclusive=False))
    weight_decay = FiniteFloat(validate=validate.Range(0, 1))
    lr_scheduler = fields.String(allow_none=True, validate=validate.OneOf(SCHEDULERS))
    warmup_steps = StrictInteger(validate=validate.Range(0, 10**9))
    total_steps = StrictInteger(allow_none=True, validate=validate.Range(1, 10**9))


class RunDevice(Output):
    """The device a run is leased."""

    host = fields.String(required=True)
    slot = fields.String(required=True)
    kind = fields.String(required=True, validate=validate.OneOf(("cpu", "cuda")))
    name = fields.String(required=True)
    dtype = fields.String(
        allow_none=True, metadata={"description": "Number format of the base weights, once loaded."}
    )


class ErrorBody(Output):
    """What went wrong, in the words of the one error shape (without the request id)."""

    code = fields.String(required=True)
    message = fields.String(required=True)
    param = fields.String(allow_none=True)
    details = fields.List(fields.Dict())
    data = fields.Dict(keys=fields.String())
    retryable = fields.Boolean(required=True)


class Run(Output):
    """A run as GET /runs/{id} gives it."""

    object = fields.String(required=True, metadata={"enum": ["run"]})
    run_id = fields.String(required=True)
    user_id = fields.String(required=True)
    name = fields.String(required=True, allow_none=True)
    labels = fields.Dict(keys=fields.String(), values=fields.String(), required=True)
    base_model = fields.String(required=True)
    status = fields.String(required=True, validate=validate.OneOf(RUN_STATUSES))
    error = fields.Nested(
        ErrorBody, required=True, allow_none=True, metadata={"description": "Why a run failed."}
    )
    config = fields.Dict(required=True, metadata={"description": "The resolved RunConfig."})
    current_step = fields.Integer(required=True, metadata={"description": "Optimizer steps taken."})
    next_seq = fields.Integer(
        required=True, metadata={"description": "The seq that the next eligible operation gets."}
    )
    applied_seq = fields.Integer(
        required=True,
        metadata={"description": "The last seq that is finished; 0 before the first."},
    )
    queued = fields.Integer(
        required=True, metadata={"description": "Eligible operations that are not finished."}
    )
    queue_position = fields.Integer(
        required=True,
        allow_none=True,
        metadata={"description": "Runs ahead of this one for a device; null when placed."},
    )
    device = fields.Nested(RunDevice, required=True, allow_none=True)
    sharing_with = fields.Integer(
        required=True,
        metadata={
            "description": "Other runs on the same worker; they have its base and its device in common."
        },
    )
    hold = fields.Nested(
        RunHold,
        required=True,
        allow_none=True,
        metadata={"description": "Why it takes no operation; null when it does."},
    )
    parent = fields.Nested(
        RunParent,
        required=True,
        allow_none=True,
        metadata={"description": "What it began from; null when that was nothing."},
    )
    branchable = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        required=True,
        allow_none=True,
        metadata={
            "description": "The kept history: a branch can begin at the seqs `from` to `to`; null without."
        },
    )
    snapshot = fields.Nested(RunSnapshot, required=True, allow_none=True)
    recovery_s = fields.Float(
        required=True,
        allow_none=True,
        metadata={
            "description": "Seconds that the loss of its worker would cost now, as far as is known."
        },
    )
    deterministic = fields.Nested(Determinism, required=True, allow_none=True)
    fingerprint = fields.Dict(
        required=True,
        allow_none=True,
        metadata={"description": "The setting that its numbers come from, once there is one."},
    )
    journal = fields.Nested(JournalSize, required=True, allow_none=True)
    created_at = rfc3339(required=True)
    updated_at = rfc3339(required=True)
    started_at = rfc3339(required=True, allow_none=True)
    ended_at = rfc3339(required=True, allow_none=True)


class RunListQuery(Input):
    """GET /runs."""

    limit = fields.Integer(load_default=20, validate=validate.Range(1, 100))
    cursor = fields.String(load_default=None, validate=validate.Length(1, 200))
    status = fields.String(load_default=None, validate=validate.OneOf(RUN_STATUSES))
    label = fields.String(
        load_default=None,
        validate=validate.Length(1, 320),
        metadata={"description": "A label's name, or name=value."},
    )


class RunList(Output):
    """A page of runs, newest first; `runs` is `data` under the original's name."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    data = fields.List(fields.Nested(Run), required=True)
    runs = fields.List(fields.Nested(Run), required=True)
    has_more = fields.Boolean(required=True)
    next_cursor = fields.String(required=True, allow_none=True)


class SessionWorker(Output):
    """The process that holds the run."""

    name = fields.String(required=True)
    pid = fields.Integer(allow_none=True)
    state = fields.String(required=True)
    heartbeat_at = rfc3339(allow_none=True)


class SessionState(Output):
    """GET /runs/{id}/session_state: what the worker holds."""

    status = fields.String(
        required=True, validate=validate.OneOf(("active", "uninitialized", "closed"))
    )
    run_id = fields.String(required=True)
    user_id = fields.String(required=True)
    current_step = fields.Integer(required=True)
    accumulation_count = fields.Integer(
        required=True, metadata={"description": "forward_backward calls since the last optim_step."}
    )
    next_seq = fields.Integer(required=True)
    applied_seq = fields.Integer(required=True)
    queued = fields.Integer(required=True)
    last_activity_at = rfc3339(required=True)
    last_activity = fields.Float(required=True, metadata={"description": "Seconds since then."})
    config = fields.Dict(required=True)
    device = fields.Nested(RunDevice, required=True, allow_none=True)
    worker = fields.Nested(SessionWorker, required=True, allow_none=True)


class CompleteRequest(Input):
    """POST /runs/{id}/complete."""

    save = StrictBoolean(load_default=True, metadata={"description": "Save a last adapter first."})
    name = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.Regexp(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z"),
        metadata={"description": "Its name; by default `final`."},
    )


class RunClosed(Output):
    """The answer of complete and cancel."""

    success = fields.Boolean(required=True)
    run_id = fields.String(required=True)
    status = fields.String(required=True, validate=validate.OneOf(CLOSED_STATUSES))
    current_step = fields.Integer(required=True)
    artifact = fields.String(
        allow_none=True, metadata={"description": "Name of the adapter that complete saved."}
    )
    message = fields.String(allow_none=True)


_NOT_CONFIG = ("name", "labels", "init_from")


def resolved(config: dict[str, Any], context_length: int) -> dict[str, Any]:
    """The run's configuration with every default filled in, as it is stored and shown."""
    out = {key: value for key, value in config.items() if key not in _NOT_CONFIG}
    if out["max_seq_length"] is None:
        out["max_seq_length"] = min(2048, context_length)
    return out
