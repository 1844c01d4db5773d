"""What every operation may carry, and what its names look like."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.fields import Input, StrictInteger

MAX_BATCH = 128
NAME = validate.Regexp(
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z",
    error="1 to 100 of A-Z a-z 0-9 . _ -, not beginning with a mark.",
)


class Placed(Input):
    """What every operation may carry: the client's own name for it."""

    lane = fields.String(
        validate=validate.Regexp(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}\Z"),
        metadata={"description": "An ordered lane of the client's own; needs client_seq."},
    )
    client_seq = StrictInteger(
        validate=validate.Range(1, 2**53),
        metadata={
            "description": (
                "1, 2, 3, … within the lane; operations may arrive in any order and are executed in this one."
            )
        },
    )

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def _both(self, data: dict[str, Any], original: Any, **kwargs: Any) -> None:
        if isinstance(original, dict) and ("lane" in original) != ("client_seq" in original):
            missing = "client_seq" if "lane" in original else "lane"
            raise ValidationError("lane and client_seq go together.", missing)
