"""The primitives: what each call takes. Answers are in `results`."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.examples import TrainingExample
from schemas.fields import FiniteFloat, Input, OneOf, StrictBoolean, StrictInteger
from schemas.placed import MAX_BATCH, NAME, Placed
from schemas.sampling import SampleRequest

KINDS = (
    "forward_backward",
    "forward",
    "optim_step",
    "sample",
    "save_state",
    "load_state",
)


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
    logprobs = StrictBoolean(
        load_default=False,
        metadata={
            "description": (
                "Give the log-probability of every target in `rows`, also of those that the loss does not "
                "count."
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
