"""Rows: the one form of data that the engine trains on, and rows as bytes for the journal.

Pure. Rows live in `array` buffers, since the web tier has no numpy: 64 rows of 4,096 tokens are packed
in a few milliseconds, and a batch of plain rows carries nothing but its four fields.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, TypeAlias

# Texts, since neither class can be subscripted at run time before Python 3.12 and 3.14.
Ints: TypeAlias = "array[int] | memoryview[int]"
Floats: TypeAlias = "array[float] | memoryview[float]"

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _nothing() -> Mapping[str, Any]:
    return _NOTHING


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sequence: after tokens[i], targets[i] is predicted with weights[i].

    Buffers of N entries, int32, int32 and float32, little-endian; with K targets per position, `targets`
    and `weights` hold N * K, position by position. `arrays` are further float32 numbers per position
    (`logprobs`, `advantages`, …), `values` numbers of the whole row (`reward`, `chosen`, …). `example` is
    the index in the batch of the example that the row was made of, -1 where there is none. A row that is
    not `trained` only lends its log-probabilities to a statistic of the batch.

    `unpack_rows` gives read-only views: `numpy.frombuffer(row.tokens, numpy.int32)` reads either kind
    without a copy.
    """

    tokens: Ints
    targets: Ints
    weights: Floats
    arrays: Mapping[str, Floats] = field(default_factory=_nothing)
    values: Mapping[str, float] = field(default_factory=_nothing)
    example: int = -1
    trained: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Targets per position, K."""
        return len(self.targets) // len(self.tokens)


def pack_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows one after another as bytes: `{lengths, tokens, targets, weights}`, and what else they have.

    `widths`, `examples` and `untrained` are there where they are not 1, the rows' own numbers, and none;
    `arrays` and `values` hold, per name, the numbers of the rows that have it and their content.
    """
    packed: dict[str, Any] = {
        "lengths": [len(row) for row in rows],
        "tokens": b"".join(row.tokens for row in rows),
        "targets": b"".join(row.targets for row in rows),
        "weights": b"".join(row.weights for row in rows),
    }
    if any(len(row.targets) != len(row.tokens) for row in rows):
        packed["widths"] = [row.width for row in rows]
    if any(row.example not in (-1, number) for number, row in enumerate(rows)):
        packed["examples"] = [row.example for row in rows]
    if not all(row.trained for row in rows):
        packed["untrained"] = [number for number, row in enumerate(rows) if not row.trained]
    for name in sorted({name for row in rows for name in row.arrays}):
        numbers = [number for number, row in enumerate(rows) if name in row.arrays]
        data = b"".join(rows[number].arrays[name] for number in numbers)
        packed.setdefault("arrays", {})[name] = [numbers, data]
    for name in sorted({name for row in rows for name in row.values}):
        numbers = [number for number, row in enumerate(rows) if name in row.values]
        found = [float(rows[number].values[name]) for number in numbers]
        packed.setdefault("values", {})[name] = [numbers, found]
    return packed


def unpack_rows(packed: Mapping[str, Any]) -> list[Row]:
    """The reverse of `pack_rows`, without a copy: the rows are views of the packed bytes.

    Raises ValueError when the parts do not fit each other.
    """
    tokens = memoryview(packed["tokens"]).cast("i")
    targets = memoryview(packed["targets"]).cast("i")
    weights = memoryview(packed["weights"]).cast("f")
    lengths = packed["lengths"]
    ends = list(accumulate(lengths, initial=0))
    widths = packed.get("widths")
    wide = ends if widths is None else _ends([n * k for n, k in zip(lengths, widths, strict=True)])
    if not (ends[-1] == len(tokens) and wide[-1] == len(targets) == len(weights)):
        raise ValueError("packed rows: the lengths do not match the arrays")
    if len(packed) == 4:
        return [
            Row(tokens[start:end], targets[start:end], weights[start:end], example=number)
            for number, (start, end) in enumerate(pairwise(ends))
        ]
    arrays, values = _arrays(packed, lengths), _values(packed, len(lengths))
    examples = packed.get("examples", range(len(lengths)))
    untrained = set(packed.get("untrained", ()))
    spans = zip(pairwise(ends), pairwise(wide), strict=True)
    return [
        Row(
            tokens[start:end],
            targets[first:last],
            weights[first:last],
            arrays[number],
            values[number],
            examples[number],
            number not in untrained,
        )
        for number, ((start, end), (first, last)) in enumerate(spans)
    ]


def _ends(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _arrays(packed: Mapping[str, Any], lengths: Sequence[int]) -> list[dict[str, Floats]]:
    found: list[dict[str, Floats]] = [{} for _ in lengths]
    for name, (numbers, data) in packed.get("arrays", {}).items():
        ends, numbers_of = (
            _ends([lengths[number] for number in numbers]),
            memoryview(data).cast("f"),
        )
        if ends[-1] != len(numbers_of):
            raise ValueError(f"packed rows: the lengths do not match {name}")
        for number, (start, end) in zip(numbers, pairwise(ends), strict=True):
            found[number][name] = numbers_of[start:end]
    return found


def _values(packed: Mapping[str, Any], count: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for name, (numbers, of_rows) in packed.get("values", {}).items():
        for number, value in zip(numbers, of_rows, strict=True):
            found[number][name] = value
    return found
