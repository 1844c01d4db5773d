"""What the primitives answer, and futures."""

from __future__ import annotations

from marshmallow import fields, validate

from schemas.fields import Output, rfc3339
from schemas.runs import ErrorBody

STATUSES = ("pending", "running", "completed", "failed", "cancelled")
OPERATION_KINDS = (
    "forward_backward",
    "forward",
    "optim_step",
    "sample",
    "save_state",
    "load_state",
    "certificate",
    "complete",
)


class Timings(Output):
    """Where the time of one operation went, in milliseconds."""

    queued_ms = fields.Float(
        required=True, metadata={"description": "From submission to the worker's start."}
    )
    execute_ms = fields.Float(required=True, metadata={"description": "The worker's own work."})


class ScoredRow(Output):
    """One row of a loss: a preference gives two, the chosen one first, a group one per response."""

    example = fields.Integer(
        required=True, metadata={"description": "Index in batch_data of what the row was made of."}
    )
    logprobs = fields.List(
        fields.Raw(),
        required=True,
        metadata={"description": "Of the row's targets, in nats; K each where given."},
    )


class ForwardBackwardResult(Output):
    """Answer of forward_backward."""

    seq = fields.Integer(required=True)
    step = fields.Integer(
        required=True, metadata={"description": "Optimizer steps taken before this call."}
    )
    loss = fields.Float(
        required=True,
        metadata={
            "description": (
                "loss_sum over what the loss is a mean of (weights, rows, pairs); over num_tokens for a sum."
            )
        },
    )
    loss_sum = fields.Float(required=True, metadata={"description": "In nats, of the whole batch."})
    divisor = fields.Float(
        required=True, metadata={"description": "What `loss` is loss_sum divided by."}
    )
    num_tokens = fields.Integer(
        required=True, metadata={"description": "Tokens with a weight other than 0."}
    )
    grad_norm = fields.Float(
        required=True, metadata={"description": "L2 norm of this call's gradient."}
    )
    accumulated_grad_norm = fields.Float(
        required=True,
        metadata={
            "description": "L2 norm of the gradients since the last optim_step, as one would take it now."
        },
    )
    accumulated_calls = fields.Integer(
        required=True, metadata={"description": "How many calls those gradients are of."}
    )
    metrics = fields.Dict(
        keys=fields.String(),
        values=fields.Float(),
        required=True,
        metadata={"description": "Of the loss, by the names in docs/losses.md; and input_tokens."},
    )
    metric_counts = fields.Dict(
        keys=fields.String(),
        values=fields.Float(),
        required=True,
        metadata={
            "description": "What each metric of the loss is a mean over, so that calls can be added up."
        },
    )
    rows = fields.List(
        fields.Nested(ScoredRow),
        required=True,
        allow_none=True,
        metadata={"description": "null unless `logprobs` asked for them."},
    )
    timings = fields.Nested(Timings, required=True)


class ForwardRow(Output):
    """One row of a forward: a preference gives two, the chosen one first, a group one per response."""

    example = fields.Integer(
        required=True, metadata={"description": "Index in batch_data of what the row was made of."}
    )
    token_ids = fields.List(fields.Integer(), required=True)
    target_ids = fields.List(
        fields.Raw(),
        required=True,
        metadata={
            "description": "target_ids[i] is predicted after token_ids[i]; K each where given."
        },
    )
    logprobs = fields.List(
        fields.Raw(allow_none=True),
        required=True,
        metadata={
            "description": "Of target_ids, in the same shape, in nats; null where not computed."
        },
    )
    top_token_ids = fields.List(
        fields.Raw(allow_none=True),
        required=True,
        allow_none=True,
        metadata={"description": "The top_k likeliest tokens of each position, or null."},
    )
    top_logprobs = fields.List(
        fields.Raw(allow_none=True),
        required=True,
        allow_none=True,
        metadata={"description": "Their log-probabilities, greatest first, or null."},
    )


class ForwardResult(Output):
    """Answer of forward."""

    seq = fields.Integer(required=True)
    weights_step = fields.Integer(
        required=True, metadata={"description": "Optimizer steps behind the weights."}
    )
    rows = fields.List(fields.Nested(ForwardRow), required=True)
    metrics = fields.Dict(keys=fields.String(), values=fields.Float(), required=True)
    timings = fields.Nested(Timings, required=True)


class OptimStepResult(Output):
    """Answer of optim_step."""

    seq = fields.Integer(required=True)
    step = fields.Integer(
        required=True, metadata={"description": "Optimizer steps taken, this one included."}
    )
    learning_rate = fields.Float(required=True)
    grad_norm = fields.Float(
        required=True,
        metadata={"description": "L2 norm of the accumulated gradient before clipping."},
    )
    metrics = fields.Dict(keys=fields.String(), values=fields.Float(), required=True)
    timings = fields.Nested(Timings, required=True)


class Sample(Output):
    """One sampled continuation."""

    text = fields.String(
        required=True, metadata={"description": "Without the stop token or stop text."}
    )
    token_ids = fields.List(
        fields.Integer(),
        required=True,
        metadata={"description": "With the stop token or the stop text's tokens."},
    )
    logprobs = fields.List(fields.Float(), required=True, allow_none=True)
    top_token_ids = fields.List(
        fields.List(fields.Integer()),
        required=True,
        allow_none=True,
        metadata={"description": "The likeliest tokens at each place; null unless asked for."},
    )
    top_logprobs = fields.List(fields.List(fields.Float()), required=True, allow_none=True)
    finish_reason = fields.String(required=True, validate=validate.OneOf(("stop", "length")))


class SampledFrom(Output):
    """The weights that a sample is from."""

    source = fields.String(
        required=True, validate=validate.OneOf(("live", "current", "base", "saved"))
    )
    run_id = fields.String(
        required=True, allow_none=True, metadata={"description": "Of a saved state: who saved it."}
    )
    artifact = fields.String(required=True, allow_none=True)


class SampleResult(Output):
    """Answer of sample; `outputs`, `token_ids`, `tokens`, `logprobs` are there when n is 1."""

    seq = fields.Integer(
        required=True,
        allow_none=True,
        metadata={"description": "null of a sample that has no place in the order."},
    )
    weights = fields.Nested(SampledFrom, required=True)
    weights_step = fields.Integer(
        required=True,
        allow_none=True,
        metadata={
            "description": "Optimizer steps behind the weights sampled from; null of the bare base."
        },
    )
    samples = fields.List(
        fields.List(fields.Nested(Sample)),
        required=True,
        metadata={"description": "samples[prompt][n]."},
    )
    prompt_token_ids = fields.List(fields.List(fields.Integer()), required=True)
    prompt_logprobs = fields.List(
        fields.List(fields.Float(allow_none=True)),
        required=True,
        allow_none=True,
        metadata={"description": "Of each prompt token, null of the first; null unless asked for."},
    )
    prompt_top_token_ids = fields.List(
        fields.List(fields.List(fields.Integer(), allow_none=True)), required=True, allow_none=True
    )
    prompt_top_logprobs = fields.List(
        fields.List(fields.List(fields.Float(), allow_none=True)), required=True, allow_none=True
    )
    outputs = fields.List(fields.String())
    token_ids = fields.List(fields.List(fields.Integer()))
    tokens = fields.List(fields.List(fields.String()))
    logprobs = fields.List(fields.List(fields.Float()), allow_none=True)
    metrics = fields.Dict(keys=fields.String(), values=fields.Float(), required=True)
    timings = fields.Nested(Timings, required=True)


class SaveStateResult(Output):
    """Answer of save_state."""

    seq = fields.Integer(required=True)
    step = fields.Integer(required=True)
    name = fields.String(required=True)
    mode = fields.String(required=True)
    artifact_uri = fields.String(
        required=True, metadata={"description": "Path of the artifact under the base URL."}
    )
    size_bytes = fields.Integer(required=True)
    manifest = fields.Dict(required=True)
    timings = fields.Nested(Timings, required=True)


class LoadStateResult(Output):
    """Answer of load_state."""

    seq = fields.Integer(required=True)
    step = fields.Integer(
        required=True, metadata={"description": "Optimizer steps behind the weights as of now."}
    )
    name = fields.String(required=True, metadata={"description": "Of the saved state."})
    optimizer = fields.Boolean(
        required=True, metadata={"description": "Whether the optimizer's state was loaded too."}
    )
    timings = fields.Nested(Timings, required=True)


class Certificate(Output):
    """What a run's state is, in hashes: where they are equal, the bits are."""

    seq = fields.Integer(
        required=True, metadata={"description": "The certificate's own place in the order."}
    )
    state_seq = fields.Integer(
        required=True,
        metadata={"description": "The last operation that changed the state; 0 before the first."},
    )
    step = fields.Integer(required=True)
    sha256 = fields.String(
        required=True,
        metadata={"description": "Over `weights`, `moments`, `gradients` and `step`."},
    )
    weights = fields.String(required=True)
    moments = fields.String(
        required=True, metadata={"description": "Of the optimizer: its name, steps and moments."}
    )
    gradients = fields.String(
        required=True,
        allow_none=True,
        metadata={"description": "What is accumulated for the next step; null when nothing is."},
    )
    fingerprint = fields.Dict(
        required=True, metadata={"description": "The setting that the state was computed in."}
    )
    timings = fields.Nested(
        Timings, metadata={"description": "Not of the certificate that a completed run keeps."}
    )


class CompleteResult(Output):
    """Result of the operation that complete puts into the journal."""

    seq = fields.Integer(required=True)
    step = fields.Integer(required=True)
    artifact = fields.String(required=True, allow_none=True)
    timings = fields.Nested(Timings, required=True)


RESULTS: dict[str, type[Output]] = {
    "forward_backward": ForwardBackwardResult,
    "forward": ForwardResult,
    "optim_step": OptimStepResult,
    "sample": SampleResult,
    "save_state": SaveStateResult,
    "load_state": LoadStateResult,
    "certificate": Certificate,
    "complete": CompleteResult,
}


class Future(Output):
    """An operation's place and, once it is finished, its result or error."""

    object = fields.String(required=True, metadata={"enum": ["future"]})
    future_id = fields.String(required=True)
    run_id = fields.String(required=True)
    kind = fields.String(
        required=True,
        validate=validate.OneOf((*OPERATION_KINDS, "lost")),
        metadata={
            "description": "`lost` of an operation whose record the server lost: error journal_lost."
        },
    )
    status = fields.String(required=True, validate=validate.OneOf(STATUSES))
    seq = fields.Integer(
        required=True,
        allow_none=True,
        metadata={
            "description": (
                "null while an earlier client_seq of its lane is missing, and of a sample that has no place "
                "in the order."
            )
        },
    )
    lane = fields.String(required=True, allow_none=True)
    client_seq = fields.Integer(required=True, allow_none=True)
    position = fields.Integer(
        required=True,
        allow_none=True,
        metadata={
            "description": (
                "Unfinished operations ahead of it, of those that it waits for; null once it runs or its "
                "place is not known."
            )
        },
    )
    tokens = fields.Integer(required=True, metadata={"description": "Tokens of the request."})
    submitted_at = rfc3339(required=True)
    started_at = rfc3339(required=True, allow_none=True)
    finished_at = rfc3339(required=True, allow_none=True)
    result = fields.Dict(
        required=True, allow_none=True, metadata={"description": "The answer of the call, by kind."}
    )
    error = fields.Nested(ErrorBody, required=True, allow_none=True)


class FutureList(Output):
    """Several futures, in the order asked for or submitted."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    data = fields.List(fields.Nested(Future), required=True)


class Operation(Output):
    """One entry of the journal."""

    seq = fields.Integer(required=True)
    future_id = fields.String(required=True)
    kind = fields.String(required=True, validate=validate.OneOf(OPERATION_KINDS))
    status = fields.String(required=True, validate=validate.OneOf(STATUSES))
    tokens = fields.Integer(required=True)
    submitted_at = rfc3339(required=True)
    started_at = rfc3339(required=True, allow_none=True)
    finished_at = rfc3339(required=True, allow_none=True)
    error = fields.Nested(ErrorBody, required=True, allow_none=True)


class OperationList(Output):
    """GET /runs/{id}/operations: what finished after a seq, in order."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    data = fields.List(fields.Nested(Operation), required=True)
    has_more = fields.Boolean(required=True)
    next_seq = fields.Integer(required=True)
    applied_seq = fields.Integer(required=True)
