"""What a sample takes: prompts, weights, how tokens are chosen, and which log-probabilities come back."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, validate, validates_schema

from schemas.content import CONTENT, check_content, content_kind
from schemas.fields import FiniteFloat, OneOf, StrictBoolean, StrictInteger
from schemas.placed import MAX_BATCH, NAME, Placed

# Which weights a sample is from, beside those of a saved state.
LIVE, CURRENT, BASE = NAMED = ("live", "current", "base")
SAVED = "saved"
MAX_TOP = 20
# Prompts times `n`.
MAX_SAMPLES = 1024


class SampleRequest(Placed):
    """POST /runs/{id}/sample and /sample/stream."""

    prompts = OneOf(
        required=True,
        metadata={
            "description": "1 to 128 prompts of one kind: texts, lists of messages, or lists of token ids.",
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_BATCH,
            "items": CONTENT,
        },
    )
    weights = OneOf(
        load_default=LIVE,
        metadata={
            "description": (
                "`live`: as they are at this place in the order. The others have no place in the order "
                "(`seq` is null): they wait for nothing in the run and run beside its training. "
                "`current`: the newest when sampling begins; `base`: the model without an adapter; or a "
                "saved state."
            ),
            "oneOf": [
                {"type": "string", "enum": list(NAMED)},
                {
                    "type": "object",
                    "properties": {
                        "artifact": {"type": "string", "description": "Name of the saved state."},
                        "run_id": {
                            "type": "string",
                            "description": "The run that saved it, one of your own; left out: this run.",
                        },
                    },
                    "required": ["artifact"],
                    "additionalProperties": False,
                },
            ],
        },
    )
    max_tokens = StrictInteger(
        load_default=512,
        validate=validate.Range(0, 131_072),
        metadata={
            "description": "0, with prompt_logprobs: the prompts are scored and nothing is sampled."
        },
    )
    temperature = FiniteFloat(
        load_default=0.7, validate=validate.Range(0, 100), metadata={"description": "0 is greedy."}
    )
    top_p = FiniteFloat(load_default=0.9, validate=validate.Range(0, 1, min_inclusive=False))
    top_k = StrictInteger(
        load_default=-1,
        validate=validate.Range(-1, 10**6),
        metadata={"description": "-1 or 0: off."},
    )
    min_p = FiniteFloat(
        load_default=0.0,
        validate=validate.Range(0, 1),
        metadata={
            "description": "Leaves out tokens less likely than this times the likeliest; 0: off."
        },
    )
    stop = OneOf(
        load_default=None,
        allow_none=True,
        metadata={
            "description": (
                "A text, up to 16 texts, or up to 16 token ids. Left out: the model's end-of-text tokens; "
                "[] stops at nothing."
            ),
            "oneOf": [
                {"type": "string", "minLength": 1, "maxLength": 256},
                {
                    "type": "array",
                    "maxItems": 16,
                    "items": {"type": "string", "minLength": 1, "maxLength": 256},
                },
                {"type": "array", "maxItems": 16, "items": {"type": "integer", "minimum": 0}},
                {"type": "null"},
            ],
        },
    )
    seed = StrictInteger(
        load_default=None, allow_none=True, validate=validate.Range(-(2**63), 2**63 - 1)
    )
    n = StrictInteger(
        load_default=1,
        validate=validate.Range(1, 128),
        metadata={"description": "Samples per prompt."},
    )
    first_row = StrictInteger(
        load_default=0,
        validate=validate.Range(0, 2**31),
        metadata={
            "description": (
                "Of a part of a larger request: how many samples come before its own, so that with a seed it "
                "draws what the whole request would."
            )
        },
    )
    logprobs = StrictBoolean(
        load_default=False,
        metadata={
            "description": "Log-probability of each sampled token under the temperature-scaled distribution."
        },
    )
    top_logprobs = StrictInteger(
        load_default=0,
        validate=validate.Range(0, MAX_TOP),
        metadata={
            "description": "The likeliest tokens at each sampled place, with log-probabilities."
        },
    )
    prompt_logprobs = StrictBoolean(
        load_default=False,
        metadata={
            "description": "Log-probability of each prompt token but the first, as `forward` gives it."
        },
    )
    top_prompt_logprobs = StrictInteger(
        load_default=0,
        validate=validate.Range(0, MAX_TOP),
        metadata={
            "description": "The likeliest tokens at each place of the prompts; needs prompt_logprobs."
        },
    )
    deterministic = StrictBoolean(
        load_default=False,
        metadata={
            "description": (
                "Computed in a batch of its own, so that tokens and log-probabilities are, bit for bit, what "
                "the request gets alone; slower beside others."
            )
        },
    )

    @validates_schema(skip_on_field_errors=False)
    def _prompts(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "prompts" in data:
            _check_prompts(data["prompts"])

    @validates_schema(skip_on_field_errors=False)
    def _stop(self, data: dict[str, Any], **kwargs: Any) -> None:
        _check_stop(data.get("stop"))

    @validates_schema(skip_on_field_errors=False)
    def _weights(self, data: dict[str, Any], **kwargs: Any) -> None:
        _check_weights(data.get("weights", LIVE))

    @validates_schema
    def _scores(self, data: dict[str, Any], **kwargs: Any) -> None:
        for name in ("top_prompt_logprobs",) if not data["prompt_logprobs"] else ():
            if data[name]:
                raise ValidationError("It needs prompt_logprobs.", name)
        if data["max_tokens"] == 0 and not data["prompt_logprobs"]:
            raise ValidationError(
                "0 needs prompt_logprobs: else there is nothing to do.", "max_tokens"
            )

    @validates_schema
    def _count(self, data: dict[str, Any], **kwargs: Any) -> None:
        # What is no list is named by `_prompts`, which runs in the same pass.
        count = len(data["prompts"]) * data["n"] if isinstance(data["prompts"], list) else 0
        if count > MAX_SAMPLES:
            raise ValidationError(f"prompts x n is {count}; at most 1,024 samples per call.", "n")


def _check_prompts(prompts: Any) -> None:
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_BATCH:
        raise ValidationError(f"A list of 1 to {MAX_BATCH} prompts is needed.", "prompts")
    kinds = {content_kind(prompt) for prompt in prompts}
    if None in kinds:
        index = next(i for i, prompt in enumerate(prompts) if content_kind(prompt) is None)
        raise ValidationError(
            {"prompts": {index: ["A text, a list of messages or a list of token ids is needed."]}}
        )
    if len(kinds) > 1:
        raise ValidationError("All prompts of a call must be of one kind.", "prompts")
    errors: dict[int, Any] = {}
    for index, prompt in enumerate(prompts):
        try:
            check_content(prompt)
        except ValidationError as error:
            errors[index] = error.messages
    if errors:
        raise ValidationError({"prompts": errors})


def _check_stop(stop: Any) -> None:
    items = [stop] if isinstance(stop, str) else stop
    if items is None:
        return
    if not isinstance(items, list) or len(items) > 16:
        raise ValidationError(
            "A text, or a list of at most 16 texts or token ids, is needed.", "stop"
        )
    texts = all(isinstance(item, str) and 1 <= len(item) <= 256 for item in items)
    ids = all(type(item) is int and 0 <= item < 2**31 for item in items)
    if not texts and not ids:
        raise ValidationError("Either texts of 1 to 256 characters or token ids, not both.", "stop")


def _check_weights(weights: Any) -> None:
    if isinstance(weights, str):
        if weights not in NAMED:
            raise ValidationError(
                f"One of {', '.join(NAMED)}, or a saved state, is needed.", "weights"
            )
        return
    if not isinstance(weights, dict) or not isinstance(weights.get("artifact"), str):
        raise ValidationError("A name, or an object with `artifact`, is needed.", "weights")
    if unknown := sorted(set(weights) - {"artifact", "run_id"}):
        raise ValidationError({"weights": {name: ["Unknown field."] for name in unknown}})
    try:
        NAME(weights["artifact"])
    except ValidationError as error:
        raise ValidationError({"weights": {"artifact": error.messages}}) from None
    if not isinstance(weights.get("run_id", ""), str):
        raise ValidationError({"weights": {"run_id": ["Not a valid string."]}})
