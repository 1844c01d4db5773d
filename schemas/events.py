"""Events of a run: what happened to it beside its operations."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import Input, Output, rfc3339


class EventsQuery(Input):
    """GET /runs/{id}/events."""

    after = fields.Integer(
        load_default=0,
        validate=validate.Range(0, 2**53),
        metadata={"description": "Only events with a greater id."},
    )
    wait = fields.Float(
        load_default=0.0,
        validate=validate.Range(0, 25),
        metadata={"description": "Seconds to hold until there is one; not for a stream."},
    )
    limit = fields.Integer(
        load_default=100,
        validate=validate.Range(1, 1000),
        metadata={"description": "At most so many; not for a stream."},
    )


class RunEvent(Output):
    """Something that happened to a run."""

    id = fields.Integer(required=True, metadata={"description": "Grows; the cursor."})
    type = fields.String(
        required=True,
        metadata={
            "description": (
                "placed, ready, worker_lost, rebuilt, paused, resumed, moved, rolled_back, mismatch, "
                "nondeterministic, snapshot_damaged, closed; a newer server may know more."
            )
        },
    )
    at = rfc3339(required=True)
    data = fields.Dict(
        required=True,
        metadata={
            "description": "By type, such as `from_seq`, `to_seq` and `seconds` of `rebuilt`."
        },
    )


class RunEventList(Output):
    """GET /runs/{id}/events, in order."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    data = fields.List(fields.Nested(RunEvent), required=True)
    has_more = fields.Boolean(required=True)
    next_after = fields.Integer(
        required=True, metadata={"description": "`after` of the next request."}
    )
    ended = fields.Boolean(
        required=True,
        metadata={"description": "The run has ended and nothing comes after these events."},
    )
