"""What a row must look like, checked as the server would. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewardsignal.data._errors import FieldError
from rewardsignal.data._limits import MAX_MESSAGES, MAX_TEXT, ROLES

Row = dict[str, Any]
# What becomes of fields that a row does not have by its form.
Extra = Literal["refuse", "drop", "keep"]
_EXTRA = ("refuse", "drop", "keep")
_PREFERENCE = ("prompt", "chosen", "rejected")
_NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")


def chat_row(value: Any, extra: Extra) -> Row:
    """`{"messages": […]}` of that, or of a bare list of messages."""
    row = _row({"messages": value} if isinstance(value, list) else value, ("messages",), (), extra)
    row["messages"] = _messages(row["messages"], "messages", extra)
    if all(message["role"] != "assistant" for message in row["messages"]):
        raise FieldError("messages", "No message is the assistant's: there is nothing to learn.")
    return row


def preference_row(value: Any, extra: Extra) -> Row:
    """`{"prompt": …, "chosen": …, "rejected": …}`; whole conversations are parted where they differ."""
    row = _row(value, _PREFERENCE[1:], ("prompt", *_NUMBERS), extra)
    for name in _PREFERENCE:
        if name in row:
            row[name] = _content(row[name], name, extra)
    if _is_whole(row["chosen"]) and _is_whole(row["rejected"]):
        row |= _split(row)
    if "prompt" not in row:
        raise FieldError("prompt", "Is needed.")
    for name in _PREFERENCE[1:]:
        _check_answer(row["prompt"], row[name], name)
    for name in _NUMBERS:
        if name in row:
            _check_number(row[name], name)
    return {name: row[name] for name in (*_PREFERENCE, *row)}


def answer_row(value: Any, extra: Extra) -> Row:
    """`{"prompt": …, "answer": …}`: a prompt for `sample`, and what a reward compares with."""
    row = _row(value, ("prompt", "answer"), (), extra)
    row["prompt"] = _content(row["prompt"], "prompt", extra)
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
        raise FieldError("answer", "A text or a number is needed.")
    return row


def object_row(value: Any) -> Row:
    """Any JSON object."""
    if not isinstance(value, dict):
        raise FieldError(None, "A JSON object is needed.")
    return value


def check_extra(extra: str) -> None:
    """Raises ValueError for what is no way of treating further fields."""
    if extra not in _EXTRA:
        raise ValueError(f"extra is {extra!r}, not one of {', '.join(_EXTRA)}.")


def _row(value: Any, needed: Sequence[str], allowed: Sequence[str], extra: Extra) -> Row:
    row = object_row(value)
    for name in needed:
        if name not in row:
            has = ", ".join(map(str, row)) or "no field"
            raise FieldError(name, f"Is needed; the row has {has}.")
    return _known(row, (*needed, *allowed), "", extra)


def _known(fields: Mapping[str, Any], names: Sequence[str], path: str, extra: Extra) -> Row:
    """The fields by these names, and the others as `extra` says."""
    for name in fields:
        if name not in names and extra == "refuse":
            raise FieldError(
                f"{path}{name}", "Is not known; extra='drop' leaves such out, 'keep' keeps them."
            )
    return {name: fields[name] for name in fields if name in names or extra == "keep"}


def _messages(value: Any, path: str, extra: Extra) -> list[Row]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise FieldError(path, f"A list of 1 to {MAX_MESSAGES} messages is needed.")
    return [_message(one, f"{path}.{place}", extra) for place, one in enumerate(value)]


def _message(value: Any, path: str, extra: Extra) -> Row:
    if not isinstance(value, dict):
        raise FieldError(path, "An object of role and content is needed.")
    for name in ("role", "content"):
        if name not in value:
            raise FieldError(f"{path}.{name}", "Is needed.")
    if value["role"] not in ROLES:
        raise FieldError(f"{path}.role", f"{value['role']!r} is none of {', '.join(ROLES)}.")
    _check_text(value["content"], f"{path}.content")
    return _known(value, ("role", "content"), f"{path}.", extra)


def _content(value: Any, path: str, extra: Extra) -> Any:
    """A text, messages or token ids."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _messages(value, path, extra)
    if isinstance(value, list) and value:
        return _token_ids(value, path)
    _check_text(value, path)
    if not value:
        raise FieldError(path, "Must not be empty.")
    return value


def _token_ids(value: list[Any], path: str) -> list[int]:
    for place, one in enumerate(value):
        if type(one) is not int or one < 0:
            raise FieldError(f"{path}.{place}", "A message or a token id is needed.")
    return value


def _check_text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise FieldError(path, "A text is needed.")
    if len(value) > MAX_TEXT:
        raise FieldError(path, f"At most {MAX_TEXT:,} characters; it has {len(value):,}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            # JSON can write half a pair ("\ud83d") that is no character.
            raise FieldError(path, "Has half of a surrogate pair, which is no text.") from None


def _check_number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(path, "A finite number is needed.")


def _check_answer(prompt: Any, answer: Any, path: str) -> None:
    """Messages can only answer messages, and the assistant speaks first."""
    if not _are_messages(answer):
        return
    if not _are_messages(prompt):
        raise FieldError(path, "Messages can only answer messages; the prompt is none.")
    if answer[0]["role"] != "assistant":
        raise FieldError(f"{path}.0.role", "A response begins with the assistant.")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def _is_whole(value: Any) -> bool:
    """Whether it is a conversation from its beginning, not an answer alone."""
    return _are_messages(value) and value[0]["role"] != "assistant"


def _split(row: Row) -> Row:
    """Prompt and answers of two whole conversations."""
    chosen, rejected = row["chosen"], row["rejected"]
    pairs = list(zip(chosen, rejected, strict=False))
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    prompt = chosen[:same]
    if not prompt or same in (len(chosen), len(rejected)):
        raise FieldError("rejected", "The two must begin alike and then differ.")
    given = row.get("prompt", prompt)
    if given not in (prompt, prompt[-1]["content"], prompt[0]["content"]):
        raise FieldError("prompt", "Is not how the conversations begin.")
    return {"prompt": prompt, "chosen": chosen[same:], "rejected": rejected[same:]}
