"""What a run's history allows: going back, going on elsewhere, being held; and what is said of it."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import Input, Output, StrictBoolean, rfc3339
from schemas.placed import NAME

HOLD_REASONS = ("user", "idle", "drain", "mismatch", "rolled_back")
ACCEPTABLE = ("rebuilt", "rolled_back")


class RunHold(Output):
    """Why a run takes no operation, and what its owner may accept so that it goes on."""

    reason = fields.String(required=True, validate=validate.OneOf(HOLD_REASONS))
    info = fields.Dict(
        required=True,
        metadata={
            "description": (
                "`at_seq` of a run that was rolled back; of a mismatch the `seq`, its `kind`, and the "
                "`recorded` and `rebuilt` answers."
            )
        },
    )
    accept = fields.String(
        required=True,
        allow_none=True,
        validate=validate.OneOf((*ACCEPTABLE, None)),
        metadata={"description": "What resume must accept; null when a plain resume will do."},
    )


class RunSnapshot(Output):
    """The newest verified snapshot of the whole state."""

    seq = fields.Integer(required=True, metadata={"description": "The state after this operation."})
    at = rfc3339(required=True)
    size_bytes = fields.Integer(required=True)


class Determinism(Output):
    """Whether the same operations give the same bits in this run's setting."""

    now = fields.Boolean(required=True)
    why_not = fields.String(required=True, allow_none=True)
    since_seq = fields.Integer(
        required=True,
        metadata={"description": "Every operation after this seq was executed in one setting."},
    )


class RunParent(Output):
    """What a run began from, if not from nothing."""

    run_id = fields.String(required=True)
    seq = fields.Integer(
        required=True, allow_none=True, metadata={"description": "The state after this operation."}
    )
    artifact = fields.String(
        required=True,
        allow_none=True,
        metadata={"description": "The saved state it began from; null for a branch."},
    )


class JournalSize(Output):
    """What the run holds in Redis: operations that are not yet sealed in storage."""

    operations = fields.Integer(required=True)
    bytes = fields.Integer(required=True)


class InitFrom(Input):
    """A saved state of one's own that a new run begins from."""

    run_id = fields.String(required=True, validate=validate.Length(1, 64))
    artifact = fields.String(required=True, validate=NAME)
    optimizer = StrictBoolean(
        load_default=True,
        metadata={
            "description": "With the optimizer's moments and step count (true), or the weights alone."
        },
    )


class ResumeRequest(Input):
    """POST /runs/{id}/resume."""

    accept = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.OneOf(ACCEPTABLE),
        metadata={
            "description": (
                "What the run's owner takes note of: `rebuilt` goes on with the rebuilt numbers of a "
                "mismatch, `rolled_back` with the state that the server still has."
            )
        },
    )
