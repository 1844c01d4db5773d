"""Reading and cancelling futures."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import Input, Output

MAX_IDS = 150


class FutureQuery(Input):
    """GET /futures/{id}."""

    wait = fields.Float(
        load_default=0.0,
        validate=validate.Range(0, 25),
        metadata={"description": "Seconds to hold until it is finished; at most 25."},
    )


class FuturesQuery(FutureQuery):
    """GET /futures."""

    ids = fields.String(
        required=True,
        validate=validate.Length(1, 8000),
        metadata={"description": f"Up to {MAX_IDS} future ids, separated by commas."},
    )
    until = fields.String(
        load_default="all",
        validate=validate.OneOf(("all", "any")),
        metadata={"description": "Hold until all are finished, or any."},
    )


class FutureCancelled(Output):
    """DELETE /futures/{id}."""

    future_id = fields.String(required=True)
    status = fields.String(
        required=True,
        validate=validate.OneOf(("cancelled", "stopping")),
        metadata={"description": "stopping: a running sample ends at its next token."},
    )
