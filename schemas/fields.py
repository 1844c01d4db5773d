"""Fields that marshmallow lacks: strict numbers and fast lists of tokens.

`fields.List(fields.Integer())` walks a token list element by element and is some fifty times slower
than the one-pass checks here; a batch of 128 x 4,096 tokens must not cost the web tier a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from marshmallow import Schema, ValidationError, fields

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


class StrictInteger(fields.Integer):
    """An integer: neither 1.0 nor true nor "1"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(strict=True, **kwargs)

    def _validated(self, value: Any) -> int:
        if type(value) is not int:
            raise self.make_error("invalid", input=value)
        if not -INT64_MAX - 1 <= value <= INT64_MAX:
            raise ValidationError("Not a 64-bit integer.")
        return value


class FiniteFloat(fields.Float):
    """A finite number: neither NaN nor infinite nor true nor "1.0"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_nan=False, **kwargs)

    def _validated(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.make_error("invalid", input=value)
        try:
            number = float(value)
        except OverflowError:
            raise self.make_error("too_large", input=value) from None
        if not math.isfinite(number):
            raise self.make_error("special", input=value)
        return number


class StrictBoolean(fields.Boolean):
    """true or false, never 0, "yes" or null."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class TokenList(fields.Field[list[int]]):
    """A list of token ids (int, 0 or more), checked in one pass."""

    def __init__(self, *, min_length: int = 1, max_length: int = 1_000_000, **kwargs: Any) -> None:
        kwargs.setdefault("metadata", {}).update(
            type="array",
            items={"type": "integer", "minimum": 0, "maximum": INT32_MAX},
            minItems=min_length,
            maxItems=max_length,
        )
        super().__init__(**kwargs)
        self.min_length, self.max_length = min_length, max_length

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[int]:
        _check_list(value, self.min_length, self.max_length)
        if not set(map(type, value)) <= {int}:
            index = next(i for i, item in enumerate(value) if type(item) is not int)
            raise ValidationError({index: ["Not a valid token id: an integer is needed."]})
        if value and (min(value) < 0 or max(value) > INT32_MAX):
            index = next(i for i, item in enumerate(value) if not 0 <= item <= INT32_MAX)
            raise ValidationError(
                {index: ["Not a valid token id: it must be 0 or more and below 2^31."]}
            )
        return value  # type: ignore[no-any-return]


def _fits_float32(number: float) -> bool:
    return -3.4e38 <= number <= 3.4e38


class FloatList(fields.Field[list[float]]):
    """A list of finite numbers, checked in one pass."""

    def __init__(self, *, min_length: int = 1, max_length: int = 1_000_000, **kwargs: Any) -> None:
        kwargs.setdefault("metadata", {}).update(
            type="array", items={"type": "number"}, minItems=min_length, maxItems=max_length
        )
        super().__init__(**kwargs)
        self.min_length, self.max_length = min_length, max_length

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[float]:
        _check_list(value, self.min_length, self.max_length)
        if not set(map(type, value)) <= {float, int}:
            index = next(i for i, item in enumerate(value) if type(item) not in (float, int))
            raise ValidationError({index: ["Not a valid number."]})
        # Training arrays are float32 on the worker: what overflows there is refused here.
        if not all(map(_fits_float32, value)):
            index = next(i for i, item in enumerate(value) if not _fits_float32(item))
            raise ValidationError({index: ["Not a finite number within float32."]})
        return value  # type: ignore[no-any-return]


MAX_WIDTH = 128


class _Wide(fields.Field[Any]):
    """A list that may also hold a list of K entries per position: [N] or [N][K], one K for all."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if not (isinstance(value, list) and value and isinstance(value[0], list)):
            return super()._deserialize(value, attr, data, **kwargs)
        width = len(value[0])
        if not 1 <= width <= MAX_WIDTH:
            raise ValidationError({0: [f"1 to {MAX_WIDTH} entries per position are allowed."]})
        for index, entries in enumerate(value):
            if not isinstance(entries, list) or len(entries) != width:
                raise ValidationError({index: [f"A list of {width} entries is needed, as before."]})
        try:
            super()._deserialize(list(chain.from_iterable(value)), attr, data, **kwargs)
        except ValidationError as error:
            raise ValidationError(_by_position(error.messages, width)) from None
        return value


def _by_position(messages: Any, width: int) -> Any:
    if not isinstance(messages, dict):
        return messages
    return {index // width: {index % width: found} for index, found in messages.items()}


def _wide_schema(items: dict[str, Any]) -> dict[str, Any]:
    flat = {"type": "array", "items": items, "minItems": 1, "maxItems": 1_000_000}
    inner = {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_WIDTH}
    return {"oneOf": [flat, {"type": "array", "items": inner, "minItems": 1}]}


class WideTokens(_Wide, TokenList):
    """Token ids, one or K per position, checked in one pass."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metadata = _documented(self, {"type": "integer", "minimum": 0, "maximum": INT32_MAX})


class WideFloats(_Wide, FloatList):
    """Finite numbers, one or K per position, checked in one pass."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metadata = _documented(self, {"type": "number"})


def _documented(field: fields.Field[Any], items: dict[str, Any]) -> dict[str, Any]:
    """A field's metadata with the bounds of a plain list replaced by those of either form."""
    plain = ("type", "items", "minItems", "maxItems")
    kept = {name: value for name, value in field.metadata.items() if name not in plain}
    return {**kept, **_wide_schema(items)}


class Labels(fields.Field[dict[str, str]]):
    """Up to 16 labels: name -> text."""

    _NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("metadata", {}).update(
            type="object",
            additionalProperties={"type": "string", "maxLength": 256},
            propertyNames={"pattern": f"^{self._NAME.pattern}$"},
            maxProperties=16,
        )
        super().__init__(**kwargs)

    def _deserialize(
        self, value: Any, attr: str | None, data: Any, **kwargs: Any
    ) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValidationError("Not a valid mapping of label names to texts.")
        if len(value) > 16:
            raise ValidationError("At most 16 labels.")
        for name, text in value.items():
            if not self._NAME.fullmatch(name):
                raise ValidationError(
                    {name: ["Not a valid label name: 1 to 63 of A-Z a-z 0-9 . _ / -."]}
                )
            if not isinstance(text, str) or len(text) > 256 or "\x00" in text:
                raise ValidationError(
                    {name: ["A label's value is a text of at most 256 characters."]}
                )
        return value


class OneOf(fields.Field[Any]):
    """Any JSON value; `metadata` documents the alternatives and the code that loads it decides."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return value


def rfc3339(**kwargs: Any) -> fields.String:
    """A time on the wire: RFC 3339 with Z, millisecond precision. Formatted by the web tier."""
    metadata = {"format": "date-time", **kwargs.pop("metadata", {})}
    return fields.String(metadata=metadata, **kwargs)


def _check_list(value: Any, min_length: int, max_length: int) -> None:
    if not isinstance(value, list):
        raise ValidationError("Not a valid list.")
    if len(value) < min_length:
        raise ValidationError(
            f"At least {min_length} needed." if min_length > 1 else "Must not be empty."
        )
    if len(value) > max_length:
        raise ValidationError(f"At most {max_length:,} allowed.")


class Input(Schema):
    """Base of all request schemas: an unknown field is refused by name."""

    class Meta:
        unknown = "raise"


class Output(Schema):
    """Base of all response schemas: a client ignores what a newer server adds."""

    class Meta:
        unknown = "exclude"


def load_nested(schema: Schema, value: Any, path: str | int) -> Any:
    """Load `value` with `schema`, its messages placed under `path`."""
    try:
        return schema.load(value)
    except ValidationError as error:
        raise ValidationError({path: error.messages}) from None


Messages = Mapping[str, Any]
