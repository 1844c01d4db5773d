"""The SDK's JSON requests about sampling sessions, samples and futures, by the names of its own fields."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.fields import FiniteFloat, Input, OneOf, StrictBoolean, StrictInteger
from web.tinker.requests import ID, Request


class CreateSampler(Request):
    """POST create_sampling_session."""

    session_id = fields.String(required=True, validate=ID)
    sampling_session_seq_id = StrictInteger(required=True, validate=validate.Range(0, 2**53))
    base_model = fields.String(load_default=None, allow_none=True, validate=ID)
    model_path = fields.String(load_default=None, allow_none=True, validate=ID)

    @validates_schema
    def _something(self, data: dict[str, Any], **_: Any) -> None:
        if data["base_model"] is None and data["model_path"] is None:
            raise ValidationError("base_model or model_path is needed.", "base_model")


class JoinSampler(Request):
    """POST join_sampling_session."""

    sampling_session_id = fields.String(required=True, validate=ID)


class _Sampling(Input):
    max_tokens = StrictInteger(
        load_default=None, allow_none=True, validate=validate.Range(1, 131_072)
    )
    seed = StrictInteger(load_default=None, allow_none=True)
    stop = OneOf(load_default=None, allow_none=True)
    temperature = FiniteFloat(load_default=1.0, validate=validate.Range(0, 100))
    top_k = StrictInteger(load_default=-1, validate=validate.Range(-1, 10**6))
    top_p = FiniteFloat(load_default=1.0, validate=validate.Range(0, 1, min_inclusive=False))


class Sample(Request):
    """POST asample."""

    sampling_session_id = fields.String(required=True, validate=ID)
    seq_id = StrictInteger(required=True, validate=validate.Range(0, 2**63 - 1))
    num_samples = StrictInteger(load_default=1, validate=validate.Range(1, 128))
    prompt = OneOf(required=True)
    sampling_params = fields.Nested(_Sampling, required=True)
    prompt_logprobs = StrictBoolean(load_default=False, allow_none=True)
    topk_prompt_logprobs = StrictInteger(load_default=0, validate=validate.Range(0, 20))
    topk_sample_logprobs = StrictInteger(load_default=0, validate=validate.Range(0, 20))
    prompt_logprobs_last_n = StrictInteger(
        load_default=None, allow_none=True, validate=validate.Range(min=1)
    )
    target_prompt_logprobs = OneOf(load_default=None, allow_none=True)
    prompt_alt_tokens_k = StrictInteger(load_default=0)
    record_stability_info = StrictBoolean(load_default=False, allow_none=True)
    base_model = OneOf(load_default=None, allow_none=True)
    model_path = OneOf(load_default=None, allow_none=True)

    @validates_schema
    def _supported(self, data: dict[str, Any], **_: Any) -> None:
        names = ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info")
        for name in names:
            if data[name]:
                raise ValidationError("Not supported by this server: leave it out.", name)
        for name in ("base_model", "model_path"):
            if data[name] is not None:
                raise ValidationError("The sampling session says it: leave it out.", name)


class Retrieve(Request):
    """POST retrieve_future, cancel_future."""

    request_id = fields.String(required=True, validate=ID)
    allow_metadata_only = StrictBoolean(load_default=False)


class _Target(Input):
    type = fields.String(
        load_default="sampling_session", validate=validate.Equal("sampling_session")
    )
    sampling_session_id = fields.String(required=True, validate=ID)
    cloned_sampler_id = StrictInteger(load_default=0, validate=validate.Range(0, 2**53))


class RetrieveMany(Request):
    """POST retrieve_futures. Results are kept until their time is over, whether they were read or not."""

    target = fields.Nested(_Target, required=True)
    prev_cursor = StrictInteger(load_default=0, validate=validate.Range(0, 2**53))
    timeout = FiniteFloat(load_default=None, allow_none=True, validate=validate.Range(0, 3600))
    retrieved_request_ids = fields.List(fields.String(validate=ID), load_default=list)
