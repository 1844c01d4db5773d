"""Lists of numbers from a request as arrays of a fixed width, with what is wrong named to the index. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from math import isfinite
from typing import Any

from schemas.errors import SignalError


def check_length(length: int, max_length: int, param: str) -> None:
    """Raises SignalError("sequence_too_long")."""
    if length > max_length:
        raise SignalError(
            "sequence_too_long",
            f"The sequence has {length:,} tokens and at most {max_length:,} fit: shorten or split it.",
            param=param,
        )


def check_made(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises SignalError("token_out_of_range") for ids that the tokenizer, not the client, has made."""
    if ids and max(ids) >= vocab_size:
        raise SignalError(
            "token_out_of_range",
            f"The tokenizer made token id {max(ids)}, but the model's vocabulary has {vocab_size} ids.",
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


def wide_token_array(ids: Sequence[Any], vocab_size: int, param: str) -> tuple[array[int], int]:
    """`ids` [N] or [N][K] as N * K numbers and K; errors as of `token_array`, at `param`.INDEX.INDEX."""
    if not (ids and isinstance(ids[0], list)):
        return token_array(ids, vocab_size, param), 1
    width = len(ids[0])
    try:
        return token_array(list(chain.from_iterable(ids)), vocab_size, param), width
    except SignalError as error:
        index = int((error.param or "0").rpartition(".")[2])
        where = f"{param}.{index // width}.{index % width}"
        raise SignalError(error.code, error.message, param=where) from None


def float_array(numbers: Sequence[Any], param: str) -> array[float]:
    """`numbers` [N] or [N][K] as float32. Raises SignalError for what is not finite as such."""
    wide = bool(numbers) and isinstance(numbers[0], list)
    packed = array("f", chain.from_iterable(numbers) if wide else numbers)
    # Asked of the packed numbers: 1e39 is finite as a float64 and infinite as a float32.
    if not all(map(isfinite, packed)):
        index = next(i for i, number in enumerate(packed) if not isfinite(number))
        where = f"{index // len(numbers[0])}.{index % len(numbers[0])}" if wide else str(index)
        raise SignalError(
            "validation_error", "Not a finite number within float32.", param=f"{param}.{where}"
        )
    return packed


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
