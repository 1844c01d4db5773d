"""Examples that are one sequence each, as rows: texts, conversations, token ids with their arrays. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.errors import SignalError
from workers.text.ids import check_length, check_made, float_array, token_array, wide_token_array
from workers.text.rows import Row
from workers.text.tokenizer import Tokenizer
from workers.text.turns import assistant_spans, span_weights

# Numbers per position that token rows may carry beside their weights.
ARRAYS = ("logprobs", "ref_logprobs", "advantages", "values", "returns", "sequence_ratio_mask")


@dataclass(frozen=True)
class Model:
    """What rows are made for: a tokenizer, the longest sequence that fits, and the size of the vocabulary."""

    tokenizer: Tokenizer
    max_length: int
    vocab_size: int


def compile_example(
    example: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    param: str,
) -> Row:
    """The row of one example that `schemas.examples.TrainingExample` has accepted.

    `text`: loss on every token after the first. `messages`: loss on the assistant's turns, end-of-turn
    tokens included. `tokens`: as given; without `targets` each position predicts the next token and the
    last one nothing.

    Raises SignalError("sequence_too_long" | "token_out_of_range" | "no_target_tokens" | "validation_error"
    and, for messages, those of the chat template).
    """
    return sequence_row(example, Model(tokenizer, max_length, vocab_size), param)


def sequence_row(
    example: Mapping[str, Any],
    model: Model,
    param: str,
    *,
    number: int = -1,
    empty_rows: bool = False,
) -> Row:
    """As `compile_example`; `number` is the example's place, `empty_rows` allows that nothing counts."""
    if "tokens" in example:
        row = _from_tokens(example, model, param, number)
    elif "messages" in example:
        where = f"{param}.messages"
        text, spans = assistant_spans(example["messages"], model.tokenizer, param=where)
        ids, offsets = model.tokenizer.encode_with_offsets(text, False, param=where)
        row = _shifted(ids, span_weights(offsets, spans), model, where, number)
    else:
        where = f"{param}.text"
        ids = model.tokenizer.encode(example["text"], param=where)
        row = _shifted(ids, array("f", [1.0]) * len(ids), model, where, number)
    if not len(row) or not (empty_rows or any(row.weights)):
        raise _no_targets(example, param)
    return row


def _from_tokens(example: Mapping[str, Any], model: Model, param: str, number: int) -> Row:
    ids = example["tokens"]
    check_length(len(ids), model.max_length, f"{param}.tokens")
    tokens = token_array(ids, model.vocab_size, f"{param}.tokens")
    if "targets" in example:
        where = f"{param}.targets"
        targets, width = wide_token_array(example["targets"], model.vocab_size, where)
    else:
        targets, width = tokens[1:], 1
        targets.append(0)
    arrays = {
        name: float_array(example[name], f"{param}.{name}") for name in ARRAYS if name in example
    }
    weights = _weights(example, arrays, len(targets), param)
    lengths = {"targets": len(targets) // width, "weights": len(weights) // width}
    lengths |= {name: len(values) for name, values in arrays.items()}
    for name, length in lengths.items():
        _check_same(length, len(ids), f"{param}.{name}")
    if "targets" not in example and weights:
        weights[-1] = 0.0
    return Row(tokens, targets, weights, arrays, example=number)


def _weights(
    example: Mapping[str, Any], arrays: Mapping[str, Sequence[float]], count: int, param: str
) -> array[float]:
    if "weights" in example:
        return float_array(example["weights"], f"{param}.weights")
    if "logprobs" in arrays and "advantages" in arrays:
        # Tinker's way of saying that a position was given, not sampled. It saves its logits too.
        pairs = zip(arrays["logprobs"], arrays["advantages"], strict=False)
        return array("f", [float(bool(logprob or advantage)) for logprob, advantage in pairs])
    return array("f", [1.0]) * count


def _check_same(found: int, expected: int, param: str) -> None:
    if found != expected:
        raise SignalError(
            "validation_error", f"Has {found} entries, tokens has {expected}.", param=param
        )


def _shifted(ids: list[int], weights: array[float], model: Model, param: str, number: int) -> Row:
    """A row in which weights[i] belongs to ids[i]: the first token is never predicted."""
    check_length(len(ids), model.max_length, param)
    check_made(ids, model.vocab_size, param)
    tokens = array("i", ids)
    return Row(tokens[:-1], tokens[1:], weights[1:], example=number)


def _no_targets(example: Mapping[str, Any], param: str) -> SignalError:
    if "messages" in example:
        reason, name = "The loss counts the assistant's turns, and there is none.", "messages"
    elif "text" in example:
        reason, name = "The text is a single token, so there is no next token to predict.", "text"
    elif "weights" in example:
        reason, name = "Every target has the weight 0.", "weights"
    elif "advantages" in example:
        reason, name = "Every position has advantage and logprob 0.", "advantages"
    else:
        reason, name = "A single token has no next token: give targets or more tokens.", "tokens"
    return SignalError("no_target_tokens", reason, param=f"{param}.{name}")
