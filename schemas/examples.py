"""One example of a batch, in exactly one of six forms. What a loss takes of them is in `schemas.losses`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.content import MAX_MESSAGES, MAX_TEXT, Content, Message
from schemas.fields import (
    FiniteFloat,
    FloatList,
    Input,
    StrictBoolean,
    TokenList,
    WideFloats,
    WideTokens,
)

# Each form by the field that begins it, with the fields that it needs and those it may have.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "messages": (("messages",), ()),
    "tokens": (
        ("tokens",),
        (
            "targets",
            "weights",
            "logprobs",
            "ref_logprobs",
            "advantages",
            "values",
            "returns",
            "sequence_ratio_mask",
        ),
    ),
    "preference": (
        ("prompt", "chosen", "rejected"),
        ("margin", "ref_chosen_logps", "ref_rejected_logps"),
    ),
    "group": (("prompt", "responses"), ()),
    "response": (
        ("prompt", "response"),
        ("reward", "label", "logprobs", "ref_logprobs", "values"),
    ),
}
_BEGINNINGS = {
    "text": "text",
    "messages": "messages",
    "tokens": "tokens",
    "chosen": "preference",
    "rejected": "preference",
    "responses": "group",
    "response": "response",
}
_CHOICE = "text, messages, tokens, chosen and rejected, responses, or response"


def form_of(example: Mapping[str, Any]) -> str | None:
    """The form that an example's fields begin, the first where there are several; None where none."""
    return next((form for name, form in _BEGINNINGS.items() if name in example), None)


# Within float32, in which the worker computes, and with room for arithmetic.
_MODERATE = validate.Range(-1e30, 1e30)


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValidationError("Must not be empty.")


def _length_error(value: Sized, of: str, length: int) -> str:
    return f"Has {len(value)} entries, {of} has {length}."


class Response(Input):
    """One of a group's responses, as `text` or `tokens`, with its reward."""

    text = fields.String(validate=validate.Length(1, MAX_TEXT))
    tokens = TokenList(metadata={"description": "As sampled, the stop token included."})
    reward = FiniteFloat(required=True, validate=_MODERATE)
    logprobs = FloatList(
        metadata={"description": "The sampler's log-probability of each of `tokens`, in nats."}
    )
    ref_logprobs = FloatList(
        metadata={"description": "The reference's log-probability of each of `tokens`, in nats."}
    )

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def _one_form(self, data: dict[str, Any], original: Any, **kwargs: Any) -> None:
        if not isinstance(original, dict):
            return
        if ("text" in original) == ("tokens" in original):
            raise ValidationError("Exactly one of text and tokens is needed.", "tokens")
        wrong = dict(_wrong_lengths(data, original, "tokens", ("logprobs", "ref_logprobs")))
        if wrong:
            raise ValidationError(wrong)


class TrainingExample(Input):
    """One example: `text`, `messages`, `tokens`, a preference pair, a group, or a response."""

    text = fields.String(
        validate=[validate.Length(1, MAX_TEXT), _not_blank],
        metadata={"description": "Loss on every token."},
    )
    messages = fields.List(
        fields.Nested(Message),
        validate=validate.Length(1, MAX_MESSAGES),
        metadata={"description": "A conversation; loss on the assistant's turns only."},
    )
    tokens = TokenList(metadata={"description": "Input token ids."})
    targets = WideTokens(
        metadata={
            "description": (
                "Already shifted: targets[i] is predicted after tokens[i]; or K of them per position. Left "
                "out: the next token; the last position then predicts nothing."
            )
        }
    )
    weights = WideFloats(
        metadata={
            "description": (
                "Shaped as targets: weights[i] belongs to targets[i]. Left out: 1, but 0 where both "
                "logprobs and advantages are 0, which is how a position that was not sampled is written."
            )
        }
    )
    logprobs = FloatList(
        metadata={
            "description": (
                "The sampler's log-probability of each target (of each token of `response`), in nats."
            )
        }
    )
    ref_logprobs = FloatList(
        metadata={
            "description": "The reference's, likewise. Left out: the base with the adapter off."
        }
    )
    advantages = FloatList(metadata={"description": "The advantage of each target."})
    values = FloatList(
        metadata={"description": "A critic's value before each target (token of `response`)."}
    )
    returns = FloatList(metadata={"description": "What a value at each target should have been."})
    sequence_ratio_mask = FloatList(
        metadata={"description": "gspo: the positions that the sequence's ratio is a mean over."}
    )
    prompt = Content(metadata={"description": "Never counted by a loss."})
    chosen = Content(metadata={"description": "The better response to `prompt`."})
    rejected = Content(metadata={"description": "The worse response to `prompt`."})
    margin = FiniteFloat(
        validate=_MODERATE, metadata={"description": "By how much `chosen` is better."}
    )
    ref_chosen_logps = FiniteFloat(
        validate=_MODERATE,
        metadata={"description": "The reference's log-probability of the whole response, in nats."},
    )
    ref_rejected_logps = FiniteFloat(
        validate=_MODERATE, metadata={"description": "Likewise of the rejected one."}
    )
    responses = fields.List(
        fields.Nested(Response),
        metadata={"description": "A group: 2 or more responses to `prompt` with their rewards."},
    )
    response = Content(metadata={"description": "One response to `prompt`."})
    reward = FiniteFloat(validate=_MODERATE, metadata={"description": "Of `response`."})
    label = StrictBoolean(metadata={"description": "Whether `response` is a desirable one."})

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def _one_form(self, data: dict[str, Any], original: Any, **kwargs: Any) -> None:
        if not isinstance(original, dict):
            return
        begun = [name for name in _BEGINNINGS if name in original]
        form = form_of(original)
        if form is None:
            raise ValidationError(
                f"One of {_CHOICE} is needed.", "prompt" if "prompt" in original else "text"
            )
        other = [name for name in begun if _BEGINNINGS[name] != form]
        if other:
            raise ValidationError(
                f"Exactly one of {_CHOICE} is needed, not {len(other) + 1}.", other[0]
            )
        wrong = dict(_misplaced(original, form)) | dict(_wrong_shapes(data, original, form))
        if wrong:
            raise ValidationError(wrong)


def _misplaced(original: Mapping[str, Any], form: str) -> Iterator[tuple[str, list[str]]]:
    """Fields that the form lacks, and those that it does not have."""
    needed, allowed = FORMS[form]
    for name in needed:
        if name not in original:
            yield name, [f"Is needed beside {', '.join(n for n in needed if n in original)}."]
    for name in TrainingExample._declared_fields:
        if name in original and name not in needed and name not in allowed:
            homes = [home for home, (_, others) in FORMS.items() if name in others]
            yield name, [f"Goes with {' or '.join(homes) or 'another form'} only."]
    if form == "response" and ("reward" in original) == ("label" in original):
        yield "reward", ["Exactly one of reward and label is needed beside response."]


def _wrong_shapes(
    data: Mapping[str, Any], original: Mapping[str, Any], form: str
) -> Iterator[tuple[str, list[str]]]:
    if form == "response":
        yield from _wrong_lengths(data, original, "response", FORMS["response"][1][2:])
    if form == "tokens":
        yield from _wrong_lengths(data, original, "tokens", FORMS["tokens"][1])
        targets, weights = data.get("targets"), data.get("weights")
        if targets and weights and _width(targets) != _width(weights):
            yield "weights", [f"{_width(targets)} per position are needed, as in targets."]
        elif weights and "targets" not in original and _width(weights) != 1:
            yield "weights", ["Several per position go with as many targets only."]


def _wrong_lengths(
    data: Mapping[str, Any], original: Mapping[str, Any], of: str, names: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """`names` must be as long as the token ids `of`, and have no place where there are none."""
    ids = data.get(of)
    for name in names:
        if name in original and (of not in original or isinstance(ids, str)):
            yield name, ["Goes with token ids only: what a text becomes is not known."]
        elif name in data and ids is not None and isinstance(ids[0], dict):
            yield name, ["Goes with token ids only: what a conversation becomes is not known."]
        elif name in data and ids is not None and len(data[name]) != len(ids):
            yield name, [_length_error(data[name], of, len(ids))]


def _width(values: list[Any]) -> int:
    return len(values[0]) if isinstance(values[0], list) else 1
