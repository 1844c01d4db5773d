"""A dataset: rows that can be iterated again and again and, where the source allows it, read by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from rewardsignal.data._lines import JsonLines

T = TypeVar("T")
U = TypeVar("U")


class Dataset(Generic[T]):
    """Rows of a list, of a file (`read_chat` and the like), or of any function that makes an iterable.

    Iterating begins at the first row each time and holds one row at a time. A list and a plain file also
    have `len(dataset)` and `dataset[i]`, which shuffling needs; the first use of either reads a whole file
    once, checks every line, and keeps 16 bytes per row.
    """

    def __init__(self, source: Sequence[T] | JsonLines[T] | Callable[[], Iterable[T]]) -> None:
        """Reads nothing. Raises TypeError for what can be iterated only once, such as a generator."""
        if isinstance(source, Iterator) or not (
            callable(source) or isinstance(source, Sequence | JsonLines)
        ):
            raise TypeError(
                f"A {type(source).__name__} cannot be read again from its beginning: give a list, or a "
                "function that makes an iterable."
            )
        self._source = source

    @property
    def random_access(self) -> bool:
        """Whether it has a length and rows by number."""
        if isinstance(self._source, JsonLines):
            return self._source.random_access
        return isinstance(self._source, Sequence)

    def __iter__(self) -> Iterator[T]:
        if isinstance(self._source, Sequence | JsonLines):
            return iter(self._source)
        return iter(self._source())

    def __len__(self) -> int:
        return len(self._numbered())

    def __getitem__(self, row: int) -> T:
        rows = self._numbered()
        if not -len(rows) <= row < len(rows):
            raise IndexError(f"There are {len(rows)} rows, none of number {row}.")
        return rows[row % len(rows)]

    def __bool__(self) -> bool:
        # Not by the length, which a source may not have.
        return True

    def map(self, function: Callable[[T], U]) -> Dataset[U]:
        """The same rows, each passed through `function` when it is read."""
        if self.random_access:
            return Dataset(_Mapped(self, function))
        return Dataset(lambda: map(function, self))

    def in_memory(self) -> Dataset[T]:
        """The same rows, read now and held, so that they have numbers."""
        return Dataset(list(iter(self)))

    def where(self, row: int) -> str:
        """The place of a row for a message: its file and line where there is one."""
        if isinstance(self._source, JsonLines):
            return self._source.where(row)
        if isinstance(self._source, _Mapped):
            return self._source.where(row)
        return f"row {row} (from 0)"

    def _numbered(self) -> Sequence[T] | JsonLines[T]:
        if isinstance(self._source, Sequence | JsonLines):
            return self._source
        raise TypeError("This dataset can be read in order only: use in_memory().")


class _Mapped(Sequence[U], Generic[T, U]):
    """A dataset with numbers, seen through a function."""

    def __init__(self, rows: Dataset[T], function: Callable[[T], U]) -> None:
        self._rows = rows
        self._function = function

    def __iter__(self) -> Iterator[U]:
        return map(self._function, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> U:  # type: ignore[override]  # slices are not asked for
        return self._function(self._rows[row])

    def where(self, row: int) -> str:
        return self._rows.where(row)
