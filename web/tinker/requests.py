"""The SDK's JSON requests, by the names of its own fields; one that this server would ignore is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from schemas.errors import SignalError
from schemas.fields import FiniteFloat, Input, OneOf, StrictBoolean, StrictInteger
from schemas.placed import NAME
from web.errors import validation_error
from web.parsing import json_body
from web.tinker import encryption

ID = validate.Length(1, 300)
_SEQ = validate.Range(1, 2**53)
_TTL = validate.Range(3600, 10 * 366 * 86_400)
_NAME = validate.And(NAME, validate.Length(1, 80))


class Request(Input):
    """What all have: the SDK names the type of every request."""

    type = fields.String()


class ClientConfig(Request):
    """POST client/config, client/dynamic_config."""

    sdk_version = fields.String()


class CreateSession(Request):
    """POST create_session."""

    tags = fields.List(fields.String(), load_default=list)
    user_metadata = fields.Dict(load_default=None, allow_none=True)
    sdk_version = fields.String(load_default="", validate=validate.Length(0, 100))
    project_id = fields.String(load_default=None, allow_none=True, validate=ID)
    display_name = fields.String(load_default=None, allow_none=True, validate=ID)


class Heartbeat(Request):
    """POST session_heartbeat."""

    session_id = fields.String(required=True, validate=ID)


class _Reason(Input):
    type = fields.String(
        required=True, validate=validate.OneOf(("success", "errored", "interrupted"))
    )


class Finish(Request):
    """POST sessions/{id}/finish."""

    reason = fields.Nested(_Reason, required=True)
    detail = fields.String(load_default=None, allow_none=True)


class _Lora(Input):
    rank = StrictInteger(required=True, validate=validate.Range(1, 512))
    seed = StrictInteger(load_default=None, allow_none=True)
    train_unembed = StrictBoolean(load_default=True)
    train_mlp = StrictBoolean(load_default=True)
    train_attn = StrictBoolean(load_default=True)


def _adamw(value: Any) -> None:
    if (
        not isinstance(value, dict)
        or value.get("type", "adamw") != "adamw"
        or set(value) - {"type"}
    ):
        raise ValidationError("Only the optimizer {'type': 'adamw'} is supported.")


class CreateModel(Request):
    """POST create_model."""

    session_id = fields.String(required=True, validate=ID)
    model_seq_id = StrictInteger(required=True, validate=validate.Range(0, 2**31 - 1))
    base_model = fields.String(required=True, validate=validate.Length(1, 200))
    user_metadata = fields.Dict(load_default=None, allow_none=True)
    lora_config = fields.Nested(_Lora, required=True)
    optimizer_config = OneOf(load_default=None, allow_none=False, validate=_adamw)


class ModelRequest(Request):
    """POST get_info."""

    model_id = fields.String(required=True, validate=ID)


class _Sequenced(ModelRequest):
    seq_id = StrictInteger(required=True, validate=_SEQ)


class _Adam(Input):
    learning_rate = FiniteFloat(required=True, validate=validate.Range(0, 1))
    beta1 = FiniteFloat(load_default=0.9, validate=validate.Range(0, 1, max_inclusive=False))
    beta2 = FiniteFloat(load_default=0.95, validate=validate.Range(0, 1, max_inclusive=False))
    eps = FiniteFloat(load_default=1e-12, validate=validate.Range(0, 1))
    weight_decay = FiniteFloat(load_default=0.0, validate=validate.Range(0, 1))
    grad_clip_norm = FiniteFloat(load_default=0.0, validate=validate.Range(0, 1e9))


class OptimStep(_Sequenced):
    """POST optim_step."""

    adam_params = fields.Nested(_Adam)
    optimizer_params = OneOf()

    @validates_schema
    def _only_adam(self, data: dict[str, Any], **_: Any) -> None:
        name = "optimizer_params" if "optimizer_params" in data else "adam_params"
        if name not in data or name == "optimizer_params":
            raise ValidationError("Only AdamW is supported: send adam_params alone.", name)


class SaveWeights(_Sequenced):
    """POST save_weights."""

    path = fields.String(required=True, validate=_NAME)
    ttl_seconds = StrictInteger(load_default=None, allow_none=True, validate=_TTL)
    overwrite = StrictBoolean(load_default=False)
    user_metadata = fields.Dict(load_default=None, allow_none=True)


class SaveForSampler(_Sequenced):
    """POST save_weights_for_sampler: under a name, or for one sampling session."""

    path = fields.String(load_default=None, allow_none=True, validate=_NAME)
    sampling_session_seq_id = StrictInteger(
        load_default=None, allow_none=True, validate=validate.Range(0, 2**53)
    )
    kind = fields.String(load_default="snapshot", validate=validate.OneOf(("snapshot", "inflight")))
    ttl_seconds = StrictInteger(load_default=None, allow_none=True, validate=_TTL)
    user_metadata = fields.Dict(load_default=None, allow_none=True)

    @validates_schema
    def _one_of_both(self, data: dict[str, Any], **_: Any) -> None:
        if (data["path"] is None) == (data["sampling_session_seq_id"] is None):
            message = "Exactly one of path and sampling_session_seq_id is needed."
            raise ValidationError(message, "path")


class SaveExternal(_Sequenced):
    """POST save_weights_external."""

    path = fields.String(required=True, validate=_NAME)
    ttl_seconds = StrictInteger(load_default=None, allow_none=True, validate=_TTL)
    age_encryption_recipients = encryption.field()


class LoadWeights(Request):
    """POST load_weights: a new model (`session_id`), or into one that there is (`model_id`)."""

    model_id = fields.String(load_default=None, allow_none=True, validate=ID)
    seq_id = StrictInteger(load_default=None, allow_none=True, validate=_SEQ)
    session_id = fields.String(load_default=None, allow_none=True, validate=ID)
    model_seq_id = StrictInteger(
        load_default=None, allow_none=True, validate=validate.Range(0, 2**31 - 1)
    )
    base_model = fields.String(load_default=None, allow_none=True)
    user_metadata = fields.Dict(load_default=None, allow_none=True)
    path = fields.String(required=True, validate=ID)
    optimizer = StrictBoolean(required=True)
    optimizer_config = OneOf(load_default=None, validate=_adamw)
    weights_access_token = fields.String(load_default=None, allow_none=True)

    @validates_schema
    def _one_address(self, data: dict[str, Any], **_: Any) -> None:
        if data["weights_access_token"]:
            message = "Tokens of other accounts are not supported; publish the checkpoint instead."
            raise ValidationError(message, "weights_access_token")
        new = data["session_id"] is not None and data["model_seq_id"] is not None
        old = data["model_id"] is not None and data["seq_id"] is not None
        if new == old:
            message = "Either session_id and model_seq_id or model_id and seq_id are needed."
            raise ValidationError(message, "session_id")


class WeightsInfo(Request):
    """POST weights_info."""

    tinker_path = fields.String(required=True, validate=ID)


class CopyWeights(Request):
    """POST copy_weights."""

    source_path = fields.String(required=True, validate=ID)
    destination_project_id = fields.String(load_default=None, allow_none=True)
    session_id = fields.String(load_default=None, allow_none=True)
    model_seq_id = StrictInteger(load_default=None, allow_none=True)
    ttl_seconds = StrictInteger(load_default=None, allow_none=True, validate=_TTL)


class Ttl(Request):
    """PUT …/ttl."""

    ttl_seconds = StrictInteger(required=True, allow_none=True, validate=_TTL)


def body() -> dict[str, Any]:
    """The request's body, whatever it holds. Raises SignalError malformed_json."""
    found = json_body()
    if not isinstance(found, dict):
        raise SignalError("malformed_json", "A JSON object is needed.")
    return found


def read(schema: Schema) -> dict[str, Any]:
    """The request's body as the schema reads it. Raises SignalError that names every wrong field."""
    return load(schema, body())


def load(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the schema reads them. Raises SignalError that names every wrong field."""
    try:
        found: dict[str, Any] = schema.load(values)
    except ValidationError as error:
        raise validation_error(error.messages) from None
    return found
