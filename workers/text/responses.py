"""A prompt and a response to it as one row, the boundary between them exact. Pure.

The prompt's ids are those that `sample` makes of the same prompt, so what is trained is what was
sampled. A response's ids are the rest of the whole, where the whole begins with the prompt's ids; where
a token would lie across the boundary the response is encoded on its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.content import content_kind
from schemas.errors import SignalError
from workers.text.examples import Model
from workers.text.ids import check_length, check_made, token_array
from workers.text.prompts import render_prompt
from workers.text.rows import Row
from workers.text.turns import assistant_spans, span_weights


@dataclass(frozen=True)
class Answered:
    """Ids of a prompt and of its response; `counted[i]` is 1 where the i-th token of the response counts."""

    prompt: Sequence[int]
    response: Sequence[int]
    counted: array[float]


def prompt_ids(prompt: Any, model: Model, param: str) -> list[int]:
    """Ids of a prompt (text, messages or ids) that leave room for a response. Raises SignalError."""
    return render_prompt(
        prompt,
        model.tokenizer,
        max_length=model.max_length - 1,
        vocab_size=model.vocab_size,
        param=param,
    )


def answered(prompt: Any, ids: Sequence[int], response: Any, model: Model, param: str) -> Answered:
    """`prompt`, whose ids are `ids`, and `response` (text, messages or ids).

    A text that answers a text ends with the model's end-of-text token, a text that answers messages is
    the assistant's turn in the chat template, its end-of-turn token included. Ids are taken as they are.
    Raises SignalError as `compile_example` does, at `param`.
    """
    kinds = content_kind(prompt), content_kind(response)
    if kinds[1] == "tokens":
        found = _whole(ids, token_array(response, model.vocab_size, param))
    elif kinds[0] == "messages":
        turns = [{"role": "assistant", "content": response}] if kinds[1] == "text" else response
        found = _turns(prompt, turns, ids, model, param)
    elif kinds[1] == "messages":
        raise SignalError("validation_error", "Messages can only answer messages.", param=param)
    else:
        found = _text(prompt, response, ids, model, param)
    check_length(len(found.prompt) + len(found.response), model.max_length, param)
    check_made(found.response, model.vocab_size, param)
    if not any(found.counted):
        raise SignalError("no_target_tokens", "The response has no token.", param=param)
    return found


def answered_row(
    found: Answered,
    arrays: Mapping[str, Sequence[float]],
    values: Mapping[str, float],
    *,
    number: int,
    trained: bool = True,
) -> Row:
    """The row: `arrays` hold a number for each token of the response, and are 0 over the prompt."""
    before = len(found.prompt) - 1
    ids = array("i", [*found.prompt, *found.response])
    placed = {
        name: array("f", bytes(4 * before)) + array("f", numbers)
        for name, numbers in arrays.items()
    }
    weights = array("f", bytes(4 * before)) + found.counted
    return Row(ids[:-1], ids[1:], weights, placed, dict(values), number, trained)


def _whole(prompt: Sequence[int], response: Sequence[int]) -> Answered:
    return Answered(prompt, response, array("f", [1.0]) * len(response))


def _text(prompt: Any, response: str, ids: Sequence[int], model: Model, param: str) -> Answered:
    tokenizer = model.tokenizer
    end = tokenizer.special_tokens.get("eos", "")
    text = response if response.endswith(end) else response + end
    if isinstance(prompt, str):
        whole = tokenizer.encode(prompt + text, param=param)
        if len(whole) > len(ids) and whole[: len(ids)] == list(ids):
            return _whole(ids, whole[len(ids) :])
    return _whole(ids, tokenizer.encode(text, False, param=param))


def _turns(
    prompt: Sequence[Mapping[str, str]],
    turns: Sequence[Mapping[str, str]],
    ids: Sequence[int],
    model: Model,
    param: str,
) -> Answered:
    if turns[0]["role"] != "assistant":
        raise SignalError(
            "validation_error", "A response begins with the assistant.", param=f"{param}.0.role"
        )
    text, spans = assistant_spans([*prompt, *turns], model.tokenizer, param=param)
    own = spans[sum(message["role"] == "assistant" for message in prompt) :]
    begin, end = own[0][0], own[-1][1]
    whole, offsets = model.tokenizer.encode_with_offsets(text[:end], False, param=param)
    if len(whole) > len(ids) and whole[: len(ids)] == list(ids):
        return Answered(ids, whole[len(ids) :], span_weights(offsets[len(ids) :], own))
    rest, offsets = model.tokenizer.encode_with_offsets(text[begin:end], False, param=param)
    moved = [(start - begin, stop - begin) for start, stop in own]
    return Answered(ids, rest, span_weights(offsets, moved))
