"""Text as the API takes it: a plain text, a conversation, or token ids. One set of bounds for all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from marshmallow import ValidationError, fields, validate

from schemas.fields import Input, TokenList

MAX_TEXT = 32_768
MAX_MESSAGES = 50
ROLES = ("system", "user", "assistant", "tool")


class Message(Input):
    """One turn of a conversation."""

    role = fields.String(required=True, validate=validate.OneOf(ROLES))
    content = fields.String(required=True, validate=validate.Length(max=MAX_TEXT))


# JSON Schema of one content, for the documents of fields that hold one.
CONTENT: dict[str, Any] = {
    "oneOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_TEXT},
        {
            "type": "array",
            "minItems": 1,
            "items": {"$ref": "#/components/schemas/Message"},
            "maxItems": MAX_MESSAGES,
        },
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
    ]
}


def content_kind(value: Any) -> str | None:
    """ "text", "messages" or "tokens"; None when it is none of them."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        return "messages" if isinstance(value[0], dict) else "tokens"
    return None


def check_content(value: Any) -> None:
    """Raises ValidationError unless `value` is a text, a list of messages or a list of token ids."""
    kind = content_kind(value)
    if kind is None:
        raise ValidationError(["A text, a list of messages or a list of token ids is needed."])
    _CHECKS[kind](value)


class Content(fields.Field[Any]):
    """A text, a list of messages, or a list of token ids."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("metadata", {}).update(CONTENT)
        super().__init__(**kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        check_content(value)
        return value


def _check_text(value: str) -> None:
    if not value:
        raise ValidationError(["Must not be empty."])
    if len(value) > MAX_TEXT:
        raise ValidationError([f"At most {MAX_TEXT:,} characters."])


_MESSAGES = Message(many=True)
_TOKENS = TokenList()


def _check_messages(value: list[Any]) -> None:
    if len(value) > MAX_MESSAGES:
        raise ValidationError([f"At most {MAX_MESSAGES} messages."])
    _MESSAGES.load(value)


def _check_tokens(value: Any) -> None:
    _TOKENS.deserialize(value)


_CHECKS: dict[str, Callable[[Any], None]] = {
    "text": _check_text,
    "messages": _check_messages,
    "tokens": _check_tokens,
}
