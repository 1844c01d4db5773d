"""Chat templates: rendered with jinja2 in its immutable sandbox, with the helpers that templates expect.

A template comes with a model and is foreign code: it sees the messages' plain strings and the special
tokens, nothing of this process. Reads files of the model folder only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from schemas.errors import SignalError

Message = Mapping[str, str]


class ChatTemplate:
    """One model's template; compiled once, at its first use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the names that the template may use, such as bos_token."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: jinja2.Template | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        param: str | None = None,
    ) -> str:
        """The conversation as text. Raises SignalError("chat_template_error") at `param`."""
        try:
            if self._compiled is None:
                self._compiled = _ENVIRONMENT.from_string(self.source)
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            # Any exception: a template is a program of somebody else's, and each of its faults is an
            # answer about these messages, not a fault of the server.
            reason = str(error) or type(error).__name__
            raise SignalError(
                "chat_template_error",
                f"The model's chat template refused the messages: {reason}",
                param=param,
            ) from error


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The source of a folder's default template, or None.

    `chat_template.jinja` goes before `chat_template` in tokenizer_config.json, as in transformers; that
    may be one template or a list of named ones, of which `default` counts.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words in some templates; renders as its body alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """jinja2's namespace() without private names, by which a template could reach CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template may not set the namespace attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would put \u003c where the model was trained on <.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_SafeNamespace
    )
    return environment


_ENVIRONMENT = _make_environment()
