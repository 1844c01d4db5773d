"""A run's tokenizer, on this machine: from the files that the server serves, without torch or transformers.

Needs the extra `tokenizer` (tokenizers, jinja2): pip install 'rewardsignal[tokenizer]'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rewardsignal._schemas import TokenizerFiles

EXTRA = "It needs the extra `tokenizer`: pip install 'rewardsignal[tokenizer]'"


class Tokenizer:
    """Encodes, decodes and renders conversations as the server does for this model."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises ImportError, which says what to install, or ValueError for files that are none."""
        contents = {file.name: file.content for file in files.files}
        config = json.loads(contents.get("tokenizer_config.json", "{}"))
        special = json.loads(contents.get("special_tokens_map.json", "{}"))
        self.name = files.name
        self._named = _texts({**special, **config})
        self._backend = _backend(contents.get("tokenizer.json"), self._named)
        self._template_source = contents.get("chat_template.jinja") or _default_template(config)
        self._template: Any = None
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token")

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a conversation; `render` gives its text."""
        return self.encode(self.render(messages, add_generation_prompt), add_special_tokens=False)

    def render(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """A conversation as the model reads it. Raises ValueError for what the template refuses."""
        if self._template_source is None:
            raise ValueError(f"The model {self.name} has no chat template.")
        if self._template is None:
            self._template = _compiled(self._template_source)
        text: str = self._template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._named,
        )
        return text

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.name}, {self.vocab_size} tokens>"

    def _id(self, name: str) -> int | None:
        text = self._named.get(name)
        found: int | None = None if text is None else self._backend.token_to_id(text)
        return found


def _backend(content: str | None, named: Mapping[str, str]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"A local tokenizer is not installed. {EXTRA}") from error
    if content is None:
        raise ValueError("The server serves no tokenizer.json of this model.")
    backend = tokenizers.Tokenizer.from_str(content)
    backend.no_truncation()
    backend.no_padding()
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in named.values()
            if text not in added and backend.token_to_id(text) is not None
        ]
    )
    return backend


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by the names under which templates use them."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _default_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template}.get("default")
    return template if isinstance(template, str) else None


def _compiled(source: str) -> Any:
    """A template comes with a model and is foreign code: it runs in jinja2's immutable sandbox."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(f"Chat templates cannot be rendered here. {EXTRA}") from error

    class Generation(Extension):
        """Marks the assistant's words in some templates; renders as its body alone."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals.update(
        raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form)
    )
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _to_json(value: Any, **options: Any) -> str:
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)
