"""A model's tokenizer, from its folder's tokenizer.json, without transformers.

Ids equal those of transformers' fast tokenizer on the same folder (a test compares them). Reads
tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, config.json and
generation_config.json; a Tokenizer is not changed after it was made, so threads may share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from schemas.errors import SignalError
from workers.text.chat import ChatTemplate, Message, read_chat_template

# The names under which tokenizer_config.json gives special tokens and under which templates use them.
SPECIAL_NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# transformers writes 10^30 where a tokenizer knows no limit.
_NO_LIMIT = 10**9


class Tokenizer:
    """Encodes, decodes and renders conversations for one model."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError or ValueError when a file is missing or wrong."""
        config = _read_json(folder / "tokenizer_config.json")
        named = _special_texts({**_read_json(folder / "special_tokens_map.json"), **config})
        self._backend = _load_backend(folder / "tokenizer.json", named)
        # The post-processor adds special tokens, but may also trim spaces off the offsets, which must
        # be exact to tell an assistant's words from the template's: it runs only where it is asked for.
        self._post_processor = self._backend.post_processor
        self._backend.post_processor = None
        added = self._backend.get_added_tokens_decoder()
        self._size = self._backend.get_vocab_size(with_added_tokens=True)
        known = {name: text for name, text in named.items() if self._id_of(text) is not None}
        self.special_tokens = {
            name: known[f"{name}_token"] for name in SPECIAL_NAMES if f"{name}_token" in known
        }
        self.bos_token_id = self._id_of(self.special_tokens.get("bos"))
        self.eos_token_id = self._id_of(self.special_tokens.get("eos"))
        self.pad_token_id = self._id_of(self.special_tokens.get("pad"))
        self.unk_token_id = self._id_of(self.special_tokens.get("unk"))
        self.eos_token_ids = _eos_ids(folder, self.eos_token_id)
        self.model_max_length = _length(config.get("model_max_length"))
        self.end_marks = _end_marks(added, self.special_tokens.get("eos"))
        source = read_chat_template(folder, config)
        self._template = None if source is None else ChatTemplate(source, named)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model may have more rows than this, or fewer."""
        return self._size

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        return None if self._template is None else self._template.source

    def encode(
        self, text: str, add_special_tokens: bool = True, *, param: str | None = None
    ) -> list[int]:
        """Token ids of `text`. Raises SignalError at `param` when it is not valid Unicode."""
        return self._encode(text, add_special_tokens, param).ids  # type: ignore[no-any-return]

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = False, *, param: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of `text` that it stands for."""
        encoding = self._encode(text, add_special_tokens, param)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; an id that the tokenizer does not know stands for nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id (`Ġthe`); "" for one that it does not know."""
        return [self._backend.id_to_token(index) or "" for index in ids]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        param: str | None = None,
    ) -> str:
        """The conversation as text, special tokens included: encode it with add_special_tokens=False.

        Raises SignalError("no_chat_template" | "chat_template_error") at `param`.
        """
        if self._template is None:
            raise SignalError("no_chat_template", param=param)
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, param=param
        )

    def _encode(self, text: str, add_special_tokens: bool, param: str | None) -> Any:
        try:
            encoding = self._backend.encode(text)
        except (TypeError, UnicodeEncodeError):
            # JSON can spell half of a surrogate pair, which is no text.
            raise SignalError(
                "validation_error",
                "The text holds a lone surrogate (\\ud800 to \\udfff) and is not valid Unicode.",
                param=param,
            ) from None
        if add_special_tokens and self._post_processor is not None:
            return self._post_processor.process(encoding, None, True)
        return encoding

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._backend.token_to_id(text)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, made once per process and again when its files change."""
    folder = Path(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return _cached(folder, tuple(_changed_at(folder / name) for name in names))


@lru_cache(maxsize=16)
def _cached(folder: Path, changed_at: tuple[int, ...]) -> Tokenizer:
    return Tokenizer(folder)


def _changed_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _load_backend(file: Path, named: Mapping[str, str]) -> Backend:
    # The bindings raise a bare Exception for a missing file as for a wrong one: read it ourselves.
    text = file.read_text(encoding="utf-8")
    try:
        backend = Backend.from_str(text)
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    # A file may carry the lengths of its last use; rows are never cut or padded here.
    backend.no_truncation()
    backend.no_padding()
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in named.values() if text not in present]
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in missing
            if backend.token_to_id(text) is not None
        ]
    )
    return backend


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", …}`: every *_token that is a text or an added token's record."""
    texts = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            texts[name] = content
    return texts


def _eos_ids(folder: Path, eos_token_id: int | None) -> list[int]:
    """The tokenizer's end of text first, then those of generation_config.json (else config.json)."""
    found = [] if eos_token_id is None else [eos_token_id]
    for name in ("generation_config.json", "config.json"):
        listed = _read_json(folder / name).get("eos_token_id")
        if listed is not None:
            found += listed if isinstance(listed, list) else [listed]
            break
    return list(dict.fromkeys(found))


def _end_marks(added: Mapping[int, AddedToken], eos: str | None) -> tuple[str, ...]:
    """Texts that can end a turn: the added tokens that are not blank, and the end of text."""
    marks = {token.content for token in added.values() if token.content.strip()}
    return tuple(sorted(marks | ({eos} if eos else set())))


def _length(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_LIMIT else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return value
