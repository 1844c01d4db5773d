"""Training examples as rows of tokens, targets and weights, and rows as bytes for the journal.

Pure. Rows live in `array` buffers, since the web tier has no numpy: 64 rows of 4,096 tokens are checked
and packed in about 20 ms.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isfinite
from typing import Any, TypeAlias

from schemas.errors import Detail, SignalError, raise_all
from workers.text.tokenizer import Tokenizer
from workers.text.turns import Span, assistant_spans

# Texts, since neither class can be subscripted at run time before Python 3.12 and 3.14.
Ints: TypeAlias = "array[int] | memoryview[int]"
Floats: TypeAlias = "array[float] | memoryview[float]"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence: after tokens[i], targets[i] is predicted with weights[i].

    Three buffers of one length, int32, int32 and float32, little-endian. `unpack_rows` gives read-only
    views: `numpy.frombuffer(row.tokens, numpy.int32)` reads either kind without a copy.
    """

    tokens: Ints
    targets: Ints
    weights: Floats

    def __len__(self) -> int:
        return len(self.tokens)


def compile_batch(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    param: str = "batch_data",
) -> list[Row]:
    """A row per example. Raises one SignalError that names every wrong example, as `param`.INDEX.FIELD."""
    rows, details = [], []
    for index, example in enumerate(examples):
        try:
            row = compile_example(
                example,
                tokenizer,
                max_length=max_length,
                vocab_size=vocab_size,
                param=f"{param}.{index}",
            )
        except SignalError as error:
            details.append(Detail(error.param, error.code, error.message))
        else:
            rows.append(row)
    raise_all(details)
    return rows


def compile_example(
    example: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    vocab_size: int,
    param: str,
) -> Row:
    """The row of one example that `schemas.operations.TrainingExample` has accepted.

    `text`: loss on every token after the first. `messages`: loss on the assistant's turns, end-of-turn
    tokens included. `tokens`: as given; without `targets` each position predicts the next token and the
    last one nothing.

    Raises SignalError("sequence_too_long" | "token_out_of_range" | "no_target_tokens" | "validation_error"
    and, for messages, those of the chat template).
    """
    if "tokens" in example:
        row = _from_tokens(example, max_length, vocab_size, param)
    elif "messages" in example:
        where = f"{param}.messages"
        text, spans = assistant_spans(example["messages"], tokenizer, param=where)
        ids, offsets = tokenizer.encode_with_offsets(text, False, param=where)
        row = _shifted(ids, _turn_weights(offsets, spans), max_length, vocab_size, where)
    else:
        where = f"{param}.text"
        ids = tokenizer.encode(example["text"], param=where)
        row = _shifted(ids, array("f", [1.0]) * len(ids), max_length, vocab_size, where)
    if not any(row.weights):
        raise _no_targets(example, param)
    return row


def check_length(length: int, max_length: int, param: str) -> None:
    """Raises SignalError("sequence_too_long")."""
    if length > max_length:
        raise SignalError(
            "sequence_too_long",
            f"The sequence has {length:,} tokens and at most {max_length:,} fit: shorten or split it.",
            param=param,
        )


def token_array(ids: Sequence[int], vocab_size: int, param: str) -> array[int]:
    """`ids` as int32. Raises SignalError at `param`.INDEX for what is no id of the vocabulary."""
    try:
        # Unsigned, so that a negative id is refused by the conversion itself.
        unsigned = array("I", ids)
    except (TypeError, OverflowError):
        raise _wrong_id(ids, vocab_size, param) from None
    if (ids and max(ids) >= vocab_size) or bool in set(map(type, ids)):
        raise _wrong_id(ids, vocab_size, param)
    return array("i", unsigned.tobytes())


def pack_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows one after another as bytes: `{lengths, tokens, targets, weights}`."""
    return {
        "lengths": [len(row) for row in rows],
        "tokens": b"".join(row.tokens for row in rows),
        "targets": b"".join(row.targets for row in rows),
        "weights": b"".join(row.weights for row in rows),
    }


def unpack_rows(packed: Mapping[str, Any]) -> list[Row]:
    """The reverse of `pack_rows`, without a copy: the rows are views of the packed bytes."""
    tokens = memoryview(packed["tokens"]).cast("i")
    targets = memoryview(packed["targets"]).cast("i")
    weights = memoryview(packed["weights"]).cast("f")
    ends = list(accumulate(packed["lengths"], initial=0))
    if not ends[-1] == len(tokens) == len(targets) == len(weights):
        raise ValueError("packed rows: the lengths do not match the arrays")
    return [
        Row(tokens[start:end], targets[start:end], weights[start:end])
        for start, end in pairwise(ends)
    ]


def _from_tokens(example: Mapping[str, Any], max_length: int, vocab_size: int, param: str) -> Row:
    ids = example["tokens"]
    check_length(len(ids), max_length, f"{param}.tokens")
    tokens = token_array(ids, vocab_size, f"{param}.tokens")
    if "targets" in example:
        targets = token_array(example["targets"], vocab_size, f"{param}.targets")
    else:
        targets = tokens[1:]
        targets.append(0)
    weights = _weight_array(example.get("weights"), len(ids), f"{param}.weights")
    for name, values in (("targets", targets), ("weights", weights)):
        if len(values) != len(ids):
            raise SignalError(
                "validation_error",
                f"Has {len(values)} entries, tokens has {len(ids)}.",
                param=f"{param}.{name}",
            )
    if "targets" not in example and weights:
        weights[-1] = 0.0
    return Row(tokens, targets, weights)


def _weight_array(weights: Sequence[float] | None, length: int, param: str) -> array[float]:
    if weights is None:
        return array("f", [1.0]) * length
    packed = array("f", weights)
    # Asked of the packed numbers: 1e39 is finite as a float64 and infinite as a float32.
    if not all(map(isfinite, packed)):
        index = next(i for i, weight in enumerate(packed) if not isfinite(weight))
        raise SignalError(
            "validation_error", "Not a finite number within float32.", param=f"{param}.{index}"
        )
    return packed


def _shifted(
    ids: list[int], weights: array[float], max_length: int, vocab_size: int, param: str
) -> Row:
    """A row in which weights[i] belongs to ids[i]: the first token is never predicted."""
    check_length(len(ids), max_length, param)
    if ids and max(ids) >= vocab_size:
        raise SignalError(
            "token_out_of_range",
            f"The tokenizer made token id {max(ids)}, but the model's vocabulary has {vocab_size} ids.",
            param=param,
        )
    tokens = array("i", ids)
    return Row(tokens[:-1], tokens[1:], weights[1:])


def _turn_weights(offsets: Sequence[Span], spans: Iterable[Span]) -> array[float]:
    """1 for each token that holds a character of a span.

    A token that also holds characters of the template before the span counts: the words cannot be
    learnt without it.
    """
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    weights = array("f", bytes(4 * len(offsets)))
    for start, end in spans:
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        weights[first:stop] = array("f", [1.0]) * (stop - first)
    return weights


def _wrong_id(ids: Sequence[Any], vocab_size: int, param: str) -> SignalError:
    index, value = next(
        (index, value)
        for index, value in enumerate(ids)
        if type(value) is not int or not 0 <= value < vocab_size
    )
    if type(value) is not int:
        return SignalError(
            "validation_error", "Not a token id: an integer is needed.", param=f"{param}.{index}"
        )
    return SignalError(
        "token_out_of_range",
        f"Token id {value} is outside the model's vocabulary (0 to {vocab_size - 1}).",
        param=f"{param}.{index}",
    )


def _no_targets(example: Mapping[str, Any], param: str) -> SignalError:
    if "messages" in example:
        reason, name = "The loss counts the assistant's turns, and there is none.", "messages"
    elif "text" in example:
        reason, name = "The text is a single token, so there is no next token to predict.", "text"
    elif "weights" in example:
        reason, name = "Every target has the weight 0.", "weights"
    else:
        reason, name = "A single token has no next token: give targets or more tokens.", "tokens"
    return SignalError("no_target_tokens", reason, param=f"{param}.{name}")
