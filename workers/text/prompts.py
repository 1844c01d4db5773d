"""Prompts for sampling: texts, conversations or token ids, as token ids. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.errors import Detail, SignalError, raise_all
from workers.text.ids import check_length, token_array
from workers.text.tokenizer import Tokenizer


def render_prompts(
    prompts: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    param: str = "prompts",
) -> list[list[int]]:
    """Ids per prompt. Raises one SignalError that names every wrong prompt."""
    rendered, details = [], []
    for index, prompt in enumerate(prompts):
        try:
            ids = render_prompt(
                prompt,
                tokenizer,
                max_length=max_length,
                vocab_size=vocab_size,
                param=f"{param}.{index}",
            )
        except SignalError as error:
            details.append(Detail(error.param, error.code, error.message))
        else:
            rendered.append(ids)
    raise_all(details)
    return rendered


def render_prompt(
    prompt: Any, tokenizer: Tokenizer, *, max_length: int, vocab_size: int, param: str
) -> list[int]:
    """Ids of one prompt that `schemas.operations.SampleRequest` has accepted.

    A text gets the special tokens that the tokenizer adds, a conversation those of its chat template
    (with the generation prompt) and no others, ids stay as they are. `max_length` is what fits before
    the first sampled token. Raises SignalError as `workers.text.examples.compile_example` does.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, param=param)
    elif prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, True, param=param)
        ids = tokenizer.encode(text, False, param=param)
    else:
        ids = list(prompt)
    if not ids:
        raise SignalError("validation_error", "The prompt has no token.", param=param)
    check_length(len(ids), max_length, param)
    token_array(ids, vocab_size, param)
    return ids
