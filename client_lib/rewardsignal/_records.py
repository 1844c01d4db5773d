"""The base of every answer: a frozen record that also reads like the JSON object it came from.

`result.loss` and `result["loss"]` are the same value. Fields that a newer server adds are kept and
can be indexed; fields that an older server does not send are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

from rewardsignal._display import html_of, line_of


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Record(Mapping[str, Any]):
    """One JSON object of the wire."""

    _NESTED: ClassVar[Mapping[str, type[Record]]] = {}
    _OPTIONAL: ClassVar[frozenset[str]] = frozenset()

    _extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The record of a decoded JSON object."""
        names = _names(cls)
        values: dict[str, Any] = {name: raw.get(name) for name in names}
        for name, record in cls._NESTED.items():
            values[name] = _build(record, values[name])
        values["_extra"] = {name: raw[name] for name in raw if name not in names}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The plain JSON object, nested records included."""
        return {name: _plain(value) for name, value in self.items()}

    def __repr__(self) -> str:
        known = ((name, getattr(self, name)) for name in _names(type(self)))
        return line_of(type(self).__name__, known)

    def _repr_html_(self) -> str:
        return html_of(type(self).__name__, self.items())

    def __getitem__(self, key: str) -> Any:
        if key not in _names(type(self)):
            return self._extra[key]
        value = getattr(self, key)
        if value is None and key in self._OPTIONAL:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        for name in _names(type(self)):
            if name not in self._OPTIONAL or getattr(self, name) is not None:
                yield name
        yield from self._extra

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _names(record: type[Record]) -> tuple[str, ...]:
    return tuple(one.name for one in fields(record) if one.name != "_extra")


def _build(record: type[Record], value: Any) -> Any:
    if isinstance(value, list):
        return [_build(record, item) for item in value]
    return record.from_dict(value) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, list) else value
