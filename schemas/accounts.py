"""Who a key belongs to, as the API shows it."""

from __future__ import annotations

from marshmallow import fields

from schemas.fields import Output


class Account(Output):
    """GET /me: whose key the request was sent with."""

    object = fields.String(required=True, metadata={"enum": ["user"]})
    user_id = fields.String(required=True)
    name = fields.String(required=True)
    key_id = fields.String(
        required=True,
        metadata={"description": "The public part of the key; its other part is in no answer."},
    )
