"""Health, readiness, and the one error shape."""

from __future__ import annotations

from marshmallow import fields

from schemas.fields import Output


class Health(Output):
    """GET /health: this process answers."""

    status = fields.String(required=True, metadata={"enum": ["healthy"]})
    version = fields.String(required=True)


class Ready(Output):
    """GET /ready: this process reaches SQL and Redis; workers are reported, not required."""

    status = fields.String(required=True, metadata={"enum": ["ready", "unavailable"]})
    checks = fields.Dict(keys=fields.String(), values=fields.String(), required=True)
    workers = fields.Integer(required=True, allow_none=True)


class ErrorDetail(Output):
    """One wrong field."""

    param = fields.String(required=True, allow_none=True)
    code = fields.String(required=True)
    message = fields.String(required=True)


class ApiError(Output):
    """The inside of the one error shape."""

    code = fields.String(required=True)
    message = fields.String(required=True)
    param = fields.String(metadata={"description": "The first wrong field."})
    details = fields.List(
        fields.Nested(ErrorDetail), metadata={"description": "Every wrong field."}
    )
    data = fields.Dict(
        keys=fields.String(),
        metadata={"description": "Facts for a program, such as `at_seq` of rolled_back."},
    )
    retryable = fields.Boolean(
        required=True, metadata={"description": "Whether the same request can succeed later."}
    )
    request_id = fields.String(required=True)


class ErrorEnvelope(Output):
    """Every answer that is not a success."""

    error = fields.Nested(ApiError, required=True)
