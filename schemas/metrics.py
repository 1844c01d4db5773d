"""Metrics: the server's series of a run, and the user's own numbers beside it."""

from __future__ import annotations

import math
import re
from typing import Any

from marshmallow import ValidationError, fields, validate

from schemas.fields import Input, Output, StrictInteger, rfc3339

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:@-]{0,99}")


class Numbers(fields.Field[dict[str, float]]):
    """1 to 100 named finite numbers."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("metadata", {}).update(
            type="object",
            additionalProperties={"type": "number"},
            minProperties=1,
            maxProperties=100,
            propertyNames={"pattern": f"^{_KEY.pattern}$"},
        )
        super().__init__(**kwargs)

    def _deserialize(
        self, value: Any, attr: str | None, data: Any, **kwargs: Any
    ) -> dict[str, float]:
        if not isinstance(value, dict) or not 1 <= len(value) <= 100:
            raise ValidationError("A mapping of 1 to 100 names to numbers is needed.")
        for key, number in value.items():
            if not _KEY.fullmatch(key):
                raise ValidationError(
                    {key: ["Not a valid name: 1 to 100 of A-Z a-z 0-9 _ . / : @ -."]}
                )
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not _finite(number)
            ):
                raise ValidationError({key: ["Not a finite number."]})
        return {key: float(number) for key, number in value.items()}


def _finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


class MetricsQuery(Input):
    """GET /runs/{id}/metrics: rows in the order they were recorded."""

    limit = fields.Integer(load_default=1000, validate=validate.Range(1, 10_000))
    cursor = fields.String(load_default=None, validate=validate.Length(1, 200))


class MetricsPost(Input):
    """POST /runs/{id}/metrics: numbers of the user's own, such as reward."""

    metrics = Numbers(required=True)
    step = StrictInteger(
        load_default=None,
        allow_none=True,
        validate=validate.Range(0, 2**53),
        metadata={"description": "Left out: the run's current step."},
    )


class MetricRow(Output):
    """One row of the series: an operation's numbers (`seq` set) or the user's."""

    seq = fields.Integer(required=True, allow_none=True)
    step = fields.Integer(required=True)
    source = fields.String(required=True, validate=validate.OneOf(("run", "user")))
    kind = fields.String(required=True, allow_none=True)
    metrics = fields.Dict(keys=fields.String(), values=fields.Float(), required=True)
    created_at = rfc3339(required=True)


class RunMetrics(Output):
    """GET /runs/{id}/metrics."""

    run_id = fields.String(required=True)
    step = fields.Integer(required=True)
    metrics = fields.List(fields.Nested(MetricRow), required=True)
    has_more = fields.Boolean(required=True)
    next_cursor = fields.String(required=True, allow_none=True)
