"""GET /models, GET /models/{name}/tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask import Response
from flask.views import MethodView

from schemas.catalogue import ModelList, TokenizerFiles
from schemas.errors import SignalError
from web.answers import json_answer
from web.context import services
from web.parsing import Blueprint
from workers.catalogue import ModelEntry

blp = Blueprint("models", __name__, description="The models of this server.")


@blp.route("/models")
class ModelsView(MethodView):
    """All models."""

    @blp.response(200, ModelList, description="The models that the operator has named.")
    def get(self) -> Response:
        """List models"""
        catalogue = services().catalogue
        entries = catalogue.entries()
        names = [entry.name for entry in entries]
        data = [model_body(entry) for entry in entries]
        return json_answer({"object": "list", "models": names, "data": data})


@blp.route("/models/<path:name>/tokenizer")
class TokenizerView(MethodView):
    """A model's tokenizer."""

    @blp.response(200, TokenizerFiles, description="The tokenizer's files, as text.")
    def get(self, name: str) -> Response:
        """Read a model's tokenizer files

        Written to one folder they make the tokenizer work without the server.
        """
        catalogue = services().catalogue
        if name not in catalogue.names():
            raise SignalError("not_found", "There is no such model.")
        files = [asdict(file) for file in catalogue.tokenizer_files(name)]
        return json_answer({"name": name, "files": files})


def model_body(entry: ModelEntry) -> dict[str, Any]:
    """The wire form of a model."""
    return {
        "object": "model",
        "name": entry.name,
        "architecture": entry.architecture,
        "num_parameters": entry.num_parameters,
        "context_length": entry.context_length,
        "vocab_size": entry.vocab_size,
        "hidden_size": entry.hidden_size,
        "num_layers": entry.num_layers,
        "num_attention_heads": entry.num_attention_heads,
        "has_chat_template": entry.has_chat_template,
    }
