"""The primitives: what each call takes. Answers are in `results`."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.content import CONTENT, check_content, content_kind
from schemas.examples import TrainingExample
from schemas.fields import FiniteFloat, Input, OneOf, StrictBoolean, StrictInteger

MAX_BATCH = 128
KINDS = (
    "forward_backward",
    "forward",
    "optim_step",
    "sample",
    "save_state",
    "load_state",
)
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


class ForwardBackwardRequest(Placed):
    """POST /runs/{id}/forward_backward."""

    batch_data = fields.List(
        fields.Nested(TrainingExample), required=True, validate=validate.Length(1, MAX_BATCH)
    )
    loss_fn = fields.String(
        load_default="causal_lm",
        validate=validate.Length(1, 64),
        metadata={
            "description": (
                "causal_lm, cross_entropy, custom; dpo, ipo, simpo, orpo, kto, reward_modeling; "
                "importance_sampling, ppo, grpo, gspo, cispo, dro, conservative_ppo; or an operator's own. "
                "docs/losses.md has their formulas, rows and options."
            )
        },
    )
    loss_kwargs = fields.Dict(
        keys=fields.String(),
        load_default=dict,
        metadata={"description": "Options of the loss, such as `beta`; an unknown one is refused."},
    )
    accumulate = StrictBoolean(
        load_default=True,
        metadata={
            "description": (
                "Add to the gradients since the last optim_step (true), or discard those first (false)."
            )
        },
    )


class ForwardRequest(Placed):
    """POST /runs/{id}/forward: log-probabilities of the weights as they are here, without a gradient."""

    batch_data = fields.List(
        fields.Nested(TrainingExample),
        required=True,
        validate=validate.Length(1, MAX_BATCH),
        metadata={
            "description": (
                "Rows as of forward_backward, of any loss: their tokens, targets and weights are read, what "
                "only a loss looks at is not."
            )
        },
    )
    top_k = StrictInteger(
        load_default=0,
        validate=validate.Range(0, 20),
        metadata={"description": "The likeliest tokens of each position, with log-probabilities."},
    )
    prompt_logprobs = StrictBoolean(
        load_default=False,
        metadata={
            "description": (
                "Every position (true), prompts included, or those alone that a loss would count."
            )
        },
    )


class OptimStepRequest(Placed):
    """POST /runs/{id}/optim_step. Every parameter holds for this step alone; left out: the run's."""

    learning_rate = FiniteFloat(validate=validate.Range(0, 1))
    weight_decay = FiniteFloat(validate=validate.Range(0, 1))
    beta1 = FiniteFloat(
        validate=validate.Range(0, 1, max_inclusive=False),
        metadata={"description": "Left out: 0.9."},
    )
    beta2 = FiniteFloat(
        validate=validate.Range(0, 1, max_inclusive=False),
        metadata={"description": "Left out: 0.999."},
    )
    eps = FiniteFloat(validate=validate.Range(0, 1), metadata={"description": "Left out: 1e-8."})
    grad_clip_norm = FiniteFloat(
        validate=validate.Range(0, 1e9),
        metadata={
            "description": "Clip the gradient's L2 norm to this; 0 or left out: no clipping."
        },
    )
    on_error = fields.String(
        load_default="fail",
        validate=validate.OneOf(("fail", "continue")),
        metadata={
            "description": (
                "When a forward_backward before this step failed: fail too (and discard the gradients), or "
                "step on what there is."
            )
        },
    )


class SampleRequest(Placed):
    """POST /runs/{id}/sample. Samples from the weights as they are at this place in the order."""

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
    max_tokens = StrictInteger(load_default=512, validate=validate.Range(1, 131_072))
    temperature = FiniteFloat(
        load_default=0.7, validate=validate.Range(0, 100), metadata={"description": "0 is greedy."}
    )
    top_p = FiniteFloat(load_default=0.9, validate=validate.Range(0, 1, min_inclusive=False))
    top_k = StrictInteger(
        load_default=-1,
        validate=validate.Range(-1, 10**6),
        metadata={"description": "-1 or 0: off."},
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
    logprobs = StrictBoolean(
        load_default=False,
        metadata={
            "description": "Log-probability of each sampled token under the temperature-scaled distribution."
        },
    )

    @validates_schema(skip_on_field_errors=False)
    def _prompts(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "prompts" in data:
            _check_prompts(data["prompts"])

    @validates_schema(skip_on_field_errors=False)
    def _stop(self, data: dict[str, Any], **kwargs: Any) -> None:
        _check_stop(data.get("stop"))

    @validates_schema
    def _count(self, data: dict[str, Any], **kwargs: Any) -> None:
        # What is no list is named by `_prompts`, which runs in the same pass.
        count = len(data["prompts"]) * data["n"] if isinstance(data["prompts"], list) else 0
        if count > 1024:
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


class SaveStateRequest(Placed):
    """POST /runs/{id}/save_state."""

    name = fields.String(
        load_default=None,
        allow_none=True,
        validate=NAME,
        metadata={"description": "Left out: step-000123."},
    )
    mode = fields.String(
        load_default="adapter",
        validate=validate.OneOf(("adapter", "state")),
        metadata={
            "description": (
                "adapter: a plain PEFT folder. state: with the optimizer's moments and steps beside it, from "
                "which training goes on as if it had never stopped."
            )
        },
    )


class LoadStateRequest(Placed):
    """POST /runs/{id}/load_state. Everything must fit the run exactly: names, shapes, hashes."""

    run_id = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.Length(1, 64),
        metadata={"description": "The run that saved it, one of your own; left out: this run."},
    )
    artifact = fields.String(
        required=True, validate=NAME, metadata={"description": "Name of the saved state."}
    )
    optimizer = StrictBoolean(
        load_default=True,
        metadata={
            "description": (
                "Load the optimizer's moments and step count too (true), or the weights alone and begin "
                "with a fresh optimizer (false)."
            )
        },
    )


REQUESTS: dict[str, type[Placed]] = {
    "forward_backward": ForwardBackwardRequest,
    "forward": ForwardRequest,
    "optim_step": OptimStepRequest,
    "sample": SampleRequest,
    "save_state": SaveStateRequest,
    "load_state": LoadStateRequest,
}


class OperationsRequest(Input):
    """POST /runs/{id}/operations: several operations at once, taken in order, all or none."""

    operations = fields.List(
        OneOf(metadata={"type": "object", "description": "`kind`, and the fields of that call."}),
        required=True,
        validate=validate.Length(1, 256),
    )


class OperationsQuery(Input):
    """GET /runs/{id}/operations."""

    after_seq = fields.Integer(load_default=0, validate=validate.Range(0, 2**53))
    wait = fields.Float(
        load_default=0.0,
        validate=validate.Range(0, 25),
        metadata={"description": "Seconds to hold until something finished after the seq."},
    )
    limit = fields.Integer(load_default=100, validate=validate.Range(1, 1000))
