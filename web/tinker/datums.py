"""A forward_backward request of the SDK (a protobuf message) as Python values, not yet judged. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import SignalError
from web.tinker.protobuf import (
    Malformed,
    block_of,
    double_of,
    fields,
    int_of,
    ints_of,
    text_of,
)

FLOAT32, INT64 = 1, 2
_CODES = {FLOAT32: "f", INT64: "q"}
# A sparse tensor is a few bytes however large it says that it is.
MAX_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Tensor:
    """float32 or int64 numbers, row by row, of a shape [N] or [N, K]."""

    data: array[float] | array[int]
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether these are integers."""
        return self.data.typecode == "q"


@dataclass(frozen=True)
class Datum:
    """One example: its tokens, and what its loss takes by name."""

    tokens: array[int]
    inputs: dict[str, Tensor]


@dataclass
class ForwardBackward:
    """A whole request."""

    model_id: str = ""
    seq_id: int = 0
    loss_fn: str = ""
    config: dict[str, float | str] = field(default_factory=dict)
    forward_only: bool = False
    # Messages, read by `datums_of`.
    data: list[memoryview] = field(default_factory=list)


def read_request(body: bytes) -> ForwardBackward:
    """What is asked for, and of which model. Raises SignalError bad_request."""
    found, legacy = ForwardBackward(), dict[str, float | str]()
    try:
        for number, value in fields(memoryview(body)):
            match number:
                case 1:
                    found.model_id = text_of(value)
                case 2:
                    found.seq_id = int_of(value, 32)
                case 3:
                    found.data.append(block_of(value))
                case 4:
                    found.loss_fn = text_of(value)
                case 5:
                    legacy.update([_entry(value, legacy=True)])
                case 6:
                    found.forward_only = bool(int_of(value))
                case 7:
                    found.config.update([_entry(value)])
    except Malformed as error:
        raise SignalError(
            "bad_request", f"The body is no ForwardBackwardRequest: {error}."
        ) from None
    # An older SDK fills the older field alone.
    found.config = found.config or legacy
    return found


def datums_of(request: ForwardBackward) -> list[Datum]:
    """The examples. Raises SignalError with the place of what cannot be read."""
    return [_datum(message, f"data.{index}") for index, message in enumerate(request.data)]


def _entry(value: int | memoryview, *, legacy: bool = False) -> tuple[str, float | str]:
    """An entry of the loss's configuration; in the older form its value is a number alone."""
    key = ""
    result: float | str = 0.0
    for number, part in fields(block_of(value)):
        if number == 1:
            key = text_of(part)
        elif number == 2:
            result = double_of(part) if legacy else _config_value(block_of(part))
    return key, result


def _config_value(data: memoryview) -> float | str:
    for number, part in fields(data):
        if number in (1, 2):
            return double_of(part) if number == 1 else text_of(part)
    return 0.0


def _datum(message: memoryview, where: str) -> Datum:
    tokens, inputs = array("i"), dict[str, Tensor]()
    try:
        for number, value in fields(message):
            if number == 1:
                tokens.frombytes(_tokens(block_of(value), f"{where}.model_input"))
            elif number == 2:
                name, tensor = _named(block_of(value), where)
                inputs[name] = tensor
            elif number in (3, 4):
                raise SignalError(
                    "not_supported",
                    "Spans that say where tokens came from (stable_reinforce) are not supported.",
                    param=f"{where}.{'model_input' if number == 3 else 'loss_fn_input'}_spans",
                )
    except Malformed as error:
        raise SignalError("validation_error", f"It cannot be read: {error}.", param=where) from None
    return Datum(tokens, inputs)


def _tokens(chunk: memoryview, where: str) -> memoryview:
    for number, value in fields(chunk):
        if number == 1:
            for inner, data in fields(block_of(value)):
                if inner == 1 and len(block_of(data)) % 4 == 0:
                    return block_of(data)
        if number in (2, 3):
            raise unsupported_chunk("image" if number == 2 else "dmel", where)
    return memoryview(b"")


def unsupported_chunk(kind: str, where: str) -> SignalError:
    """What is said of an input that is no text."""
    return SignalError(
        "not_supported",
        f"Inputs of the type {kind!r} are not supported: encoded_text alone is.",
        param=where,
    )


def _named(entry: memoryview, where: str) -> tuple[str, Tensor]:
    name, message = "", memoryview(b"")
    for number, value in fields(entry):
        if number == 1:
            name = text_of(value)
        elif number == 2:
            message = block_of(value)
    return name, _tensor(message, f"{where}.loss_fn_inputs.{name}")


def _tensor(message: memoryview, where: str) -> Tensor:
    dense, sparse, code, shape = memoryview(b""), None, "", list[int]()
    for number, value in fields(message):
        match number:
            case 1:
                dense = block_of(value)
            case 2:
                sparse = block_of(value)
            case 3:
                code = _CODES.get(int_of(value), "")
            case 4:
                shape += ints_of(value)
    if not code:
        raise SignalError("validation_error", "Its dtype must be float32 or int64.", param=where)
    data = _numbers(dense, code, where) if sparse is None else _dense(sparse, code, shape, where)
    found = tuple(shape) or (len(data),)
    size = 1
    for length in found:
        size *= length
    if len(found) > 2 or min(found, default=0) < 0 or size != len(data):
        text = f"It has {len(data)} numbers, which do not fit the shape {list(found)}."
        raise SignalError("validation_error", text, param=where)
    return Tensor(data, found)


def _numbers(data: memoryview, code: str, where: str) -> array[float] | array[int]:
    numbers: array[float] | array[int] = array(code)
    if len(data) % numbers.itemsize:
        raise SignalError("validation_error", "Its bytes are no whole numbers.", param=where)
    numbers.frombytes(data)
    return numbers


def _dense(
    message: memoryview, code: str, shape: list[int], where: str
) -> array[float] | array[int]:
    """A compressed sparse tensor with its zeros."""
    parts = {number: block_of(value) for number, value in fields(message)}
    values = _numbers(parts.get(1, memoryview(b"")), code, where)
    rows = _numbers(parts.get(2, memoryview(b"")), "q", where)
    columns = _numbers(parts.get(3, memoryview(b"")), "q", where)
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > MAX_ELEMENTS:
        raise SignalError("validation_error", "A sparse tensor has a shape [N, K].", param=where)
    count, width = shape
    found: Any = array(code, bytes(values.itemsize * count * width))
    for at, value in _cells(rows, columns, values, count, width, where):
        found[at] = value
    return found  # type: ignore[no-any-return]


def _cells(
    rows: array[float] | array[int],
    columns: array[float] | array[int],
    values: array[float] | array[int],
    count: int,
    width: int,
    where: str,
) -> Iterator[tuple[int, float | int]]:
    ends = [int(end) for end in rows]
    fits = len(ends) == count + 1 and ends == sorted(ends)
    if not fits or ends[0] != 0 or ends[-1] != len(values) or len(columns) != len(values):
        raise SignalError("validation_error", "Its indices do not fit its shape.", param=where)
    for row in range(count):
        for at in range(ends[row], ends[row + 1]):
            column = int(columns[at])
            if not 0 <= column < width:
                text = "A column is outside its shape."
                raise SignalError("validation_error", text, param=where)
            yield row * width + column, values[at]
