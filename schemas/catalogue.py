"""Models and their tokenizers, as the API shows them."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, fields, validate, validates_schema

from schemas.content import MAX_MESSAGES, MAX_TEXT, Message
from schemas.fields import Input, OneOf, Output, StrictBoolean, TokenList


class Model(Output):
    """One model that the operator named."""

    object = fields.String(required=True, metadata={"enum": ["model"]})
    name = fields.String(required=True)
    architecture = fields.String(required=True)
    num_parameters = fields.Integer(required=True)
    context_length = fields.Integer(required=True, metadata={"description": "In tokens."})
    vocab_size = fields.Integer(required=True)
    hidden_size = fields.Integer(required=True)
    num_layers = fields.Integer(required=True)
    num_attention_heads = fields.Integer(required=True)
    has_chat_template = fields.Boolean(required=True)


class ModelList(Output):
    """GET /models: `models` are the names, `data` the entries."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    models = fields.List(fields.String(), required=True)
    data = fields.List(fields.Nested(Model), required=True)


class TokenizerFile(Output):
    """A file of the tokenizer."""

    name = fields.String(required=True)
    size_bytes = fields.Integer(required=True)
    sha256 = fields.String(required=True)
    content = fields.String(required=True, metadata={"description": "The file's text."})


class TokenizerFiles(Output):
    """GET /models/{name}/tokenizer: write these files to one folder for local use."""

    name = fields.String(required=True)
    files = fields.List(fields.Nested(TokenizerFile), required=True)


class TokenizeRequest(Input):
    """POST /runs/{id}/tokenize."""

    text = OneOf(
        required=True,
        metadata={
            "oneOf": [
                {"type": "string", "maxLength": MAX_TEXT},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 128,
                    "items": {"type": "string", "maxLength": MAX_TEXT},
                },
            ]
        },
    )
    add_special_tokens = StrictBoolean(load_default=True)

    @validates_schema
    def _texts(self, data: dict[str, Any], **kwargs: Any) -> None:
        text = data.get("text")
        items = [text] if isinstance(text, str) else text
        if not isinstance(items, list) or not 1 <= len(items) <= 128:
            raise ValidationError("A text or a list of 1 to 128 texts is needed.", "text")
        for index, item in enumerate(items):
            if not isinstance(item, str) or len(item) > MAX_TEXT:
                raise ValidationError(
                    {"text": {index: [f"A text of at most {MAX_TEXT:,} characters is needed."]}}
                )


class TokenizeResult(Output):
    """Ids and token strings per text."""

    token_ids = fields.List(fields.List(fields.Integer()), required=True)
    tokens = fields.List(fields.List(fields.String()), required=True)


class DetokenizeRequest(Input):
    """POST /runs/{id}/detokenize."""

    token_ids = OneOf(
        required=True,
        metadata={
            "oneOf": [
                {"type": "array", "maxItems": 131_072, "items": {"type": "integer", "minimum": 0}},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 128,
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                },
            ]
        },
    )
    skip_special_tokens = StrictBoolean(load_default=True)

    @validates_schema
    def _ids(self, data: dict[str, Any], **kwargs: Any) -> None:
        ids = data.get("token_ids")
        if not isinstance(ids, list):
            raise ValidationError("A list of token ids, or of such lists, is needed.", "token_ids")
        rows = ids if ids and isinstance(ids[0], list) else [ids]
        if len(rows) > 128:
            raise ValidationError("At most 128 lists.", "token_ids")
        field = TokenList(min_length=0, max_length=131_072)
        for index, row in enumerate(rows):
            try:
                field.deserialize(row)
            except ValidationError as error:
                where: Any = {index: error.messages} if rows is ids else error.messages
                raise ValidationError({"token_ids": where}) from None


class DetokenizeResult(Output):
    """A text for one list of ids, a list of texts for several."""

    text = OneOf(
        required=True,
        metadata={"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    )


class ChatTemplateRequest(Input):
    """POST /runs/{id}/apply_chat_template."""

    messages = fields.List(
        fields.Nested(Message), required=True, validate=validate.Length(1, MAX_MESSAGES)
    )
    add_generation_prompt = StrictBoolean(load_default=False)


class ChatTemplateResult(Output):
    """The rendered conversation and its ids (no special token is added twice)."""

    text = fields.String(required=True)
    token_ids = fields.List(fields.Integer(), required=True)


class TokenizerInfo(Output):
    """GET /runs/{id}/tokenizer_info."""

    vocab_size = fields.Integer(required=True)
    model_max_length = fields.Integer(required=True, allow_none=True)
    bos_token_id = fields.Integer(required=True, allow_none=True)
    eos_token_id = fields.Integer(required=True, allow_none=True)
    pad_token_id = fields.Integer(required=True, allow_none=True)
    unk_token_id = fields.Integer(required=True, allow_none=True)
    special_tokens = fields.Dict(keys=fields.String(), values=fields.String(), required=True)
    chat_template = fields.String(required=True, allow_none=True)


class ModelInfo(Output):
    """GET /runs/{id}/model_info."""

    base_model = fields.String(required=True)
    architecture = fields.String(required=True)
    num_parameters = fields.Integer(required=True)
    num_trainable_parameters = fields.Integer(
        required=True,
        metadata={"description": "Counted once the run is ready, before that by its rank alone."},
    )
    hidden_size = fields.Integer(required=True)
    num_layers = fields.Integer(required=True)
    num_attention_heads = fields.Integer(required=True)
    vocab_size = fields.Integer(required=True)
    max_position_embeddings = fields.Integer(required=True)
    chat_template = fields.String(required=True, allow_none=True)
