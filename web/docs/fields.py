"""What apispec leaves out of, or gets wrong in, the JSON Schema of a marshmallow field."""

from __future__ import annotations

from typing import Any

from marshmallow import fields, validate


def exact(_converter: Any, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
    """For apispec's `add_attribute_function`: what to add to the schema `ret` of `field`."""
    out: dict[str, Any] = {}
    if "propertyNames" in field.metadata:
        out["propertyNames"] = field.metadata["propertyNames"]
    if ret.get("pattern", "").endswith(r"\Z"):
        # Python's end of text (its `$` lets a line feed pass). In JSON Schema, `$` is that end.
        out["pattern"] = ret["pattern"].removesuffix(r"\Z") + "$"
    for check in field.validators:
        if isinstance(check, validate.Range):
            out |= _open_bounds(check, ret)
    return out


def _open_bounds(check: validate.Range, ret: dict[str, Any]) -> dict[str, Any]:
    """Bounds that are themselves not allowed; takes the closed ones out of `ret`."""
    out = {}
    if check.min is not None and not check.min_inclusive:
        out["exclusiveMinimum"] = ret.pop("minimum")
    if check.max is not None and not check.max_inclusive:
        out["exclusiveMaximum"] = ret.pop("maximum")
    return out
