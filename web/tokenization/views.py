"""POST /runs/{id}/{tokenize|detokenize|apply_chat_template}, GET /runs/{id}/{tokenizer_info|model_info}."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.catalogue import (
    ChatTemplateRequest,
    ChatTemplateResult,
    DetokenizeRequest,
    DetokenizeResult,
    ModelInfo,
    TokenizeRequest,
    TokenizeResult,
    TokenizerInfo,
)
from schemas.errors import Detail, raise_all
from schemas.run_config import TARGETS, UNEMBEDDING, chosen_targets
from web.answers import json_answer
from web.context import services
from web.idempotency.decorator import idempotent
from web.operations.answering import target_of
from web.operations.compile import Target
from web.parsing import Blueprint
from workers.catalogue import ModelEntry

# Matrices that are not linear layers of the blocks.
_NOT_LINEAR = ("embed_tokens", "embed_in", "embed_out", "lm_head", "wte", "wpe")

blp = Blueprint("tokenization", __name__, description="A run's tokenizer and model.")


@blp.route("/runs/<run_id>/tokenize")
class TokenizeView(MethodView):
    """Text to ids."""

    @blp.arguments(TokenizeRequest)
    @blp.response(200, TokenizeResult, description="Ids and token strings, one list per text.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Tokenize text"""
        tokenizer = target_of(run_id).tokenizer
        texts = [request["text"]] if isinstance(request["text"], str) else request["text"]
        ids = [
            tokenizer.encode(text, request["add_special_tokens"], param="text") for text in texts
        ]
        tokens = [tokenizer.token_strings(row) for row in ids]
        return json_answer({"token_ids": ids, "tokens": tokens})


@blp.route("/runs/<run_id>/detokenize")
class DetokenizeView(MethodView):
    """Ids to text."""

    @blp.arguments(DetokenizeRequest)
    @blp.response(200, DetokenizeResult, description="A text, or one per list.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Turn token ids into text"""
        target = target_of(run_id)
        ids, skip = request["token_ids"], request["skip_special_tokens"]
        nested = bool(ids) and isinstance(ids[0], list)
        rows = ids if nested else [ids]
        _check_ids(rows, target.model.vocab_size, nested)
        texts = [target.tokenizer.decode(row, skip) for row in rows]
        return json_answer({"text": texts if nested else texts[0]})


def _check_ids(rows: list[list[int]], vocab_size: int, nested: bool) -> None:
    def where(row: int, index: int) -> str:
        return f"token_ids.{row}.{index}" if nested else f"token_ids.{index}"

    text = f"The vocabulary has {vocab_size:,} ids."
    raise_all(
        Detail(
            where(i, next(j for j, t in enumerate(row) if t >= vocab_size)),
            "token_out_of_range",
            text,
        )
        for i, row in enumerate(rows)
        if row and max(row) >= vocab_size
    )


@blp.route("/runs/<run_id>/apply_chat_template")
class ChatTemplateView(MethodView):
    """Messages to text."""

    @blp.arguments(ChatTemplateRequest)
    @blp.response(200, ChatTemplateResult, description="The text and its ids.")
    @idempotent
    def post(self, request: dict[str, Any], run_id: str) -> Response:
        """Render messages with the model's chat template

        No special token is added beside those that the template writes.
        """
        tokenizer = target_of(run_id).tokenizer
        text = tokenizer.apply_chat_template(
            request["messages"], request["add_generation_prompt"], param="messages"
        )
        return json_answer({"text": text, "token_ids": tokenizer.encode(text, False)})


@blp.route("/runs/<run_id>/tokenizer_info")
class TokenizerInfoView(MethodView):
    """The tokenizer's facts."""

    @blp.response(200, TokenizerInfo, description="The tokenizer.")
    def get(self, run_id: str) -> Response:
        """Describe the tokenizer"""
        tokenizer = target_of(run_id).tokenizer
        names = ("vocab_size", "model_max_length", "special_tokens", "chat_template")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        return json_answer({name: getattr(tokenizer, name) for name in (*names, *ids)})


@blp.route("/runs/<run_id>/model_info")
class ModelInfoView(MethodView):
    """The model's facts."""

    @blp.response(200, ModelInfo, description="The run's base model and adapter.")
    def get(self, run_id: str) -> Response:
        """Describe the model"""
        target = target_of(run_id)
        return json_answer(model_info(target))


def model_info(target: Target) -> dict[str, Any]:
    """The wire form."""
    model, config = target.model, target.facts.config
    trainable = model.adapter_parameters(config["lora_r"], chosen_targets(config))
    if not config["lora_r"]:
        trainable = model.num_parameters
    elif UNEMBEDDING in chosen_targets(config) and UNEMBEDDING not in model.linear_widths:
        # Of a model whose output shares the matrix of its input.
        trainable += config["lora_r"] * (model.hidden_size + model.vocab_size)
    # The worker has counted them, patterns and magnitudes included.
    head = services().journal.head(target.facts.run_id)
    trainable = head.state.get("trainable", trainable) if head is not None else trainable
    return {
        "base_model": model.name,
        "architecture": model.architecture,
        "num_parameters": model.num_parameters,
        "num_trainable_parameters": trainable,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "chat_template": target.tokenizer.chat_template,
    }


def default_targets(model: ModelEntry) -> list[str]:
    """The matrices that get an adapter when the configuration names none, as the engine chooses them."""
    usual = [name for name in TARGETS if name in model.linear_widths]
    return usual or [name for name in model.linear_widths if name not in _NOT_LINEAR]
