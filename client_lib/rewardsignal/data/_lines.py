"""The rows of a JSONL file: in order without holding them, or by number through an index of its lines."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from rewardsignal.data._errors import DataError, FieldError

T = TypeVar("T")
# A path, or an open file of text or bytes (any iterable of lines).
Lines: TypeAlias = Iterable[bytes] | Iterable[str]
Source: TypeAlias = str | os.PathLike[str] | Lines
Numbered: TypeAlias = Iterator[tuple[int, int, bytes | str]]
_GZIP = b"\x1f\x8b"


class JsonLines(Generic[T]):
    """One row per line that is not blank, as `parse` makes it of the line's JSON value.

    A path is opened anew by each iteration and may be compressed (gzip). An open file can be read once.
    """

    def __init__(self, source: Source, parse: Callable[[Any], T]) -> None:
        """Reads nothing. `parse` raises FieldError for a value that is no such row."""
        self._path: Path | None = None
        self._file: Lines | None = None
        if isinstance(source, str | os.PathLike):
            self._path, self.name = Path(source), os.fspath(source)
        else:
            self._file, self.name = source, str(getattr(source, "name", "<data>"))
        self._parse = parse
        self._index: _Index | None = None

    @property
    def random_access(self) -> bool:
        """Whether rows can be read by number: those of a file that is not compressed."""
        if self._path is None or not self._path.is_file():
            # A pipe is not even opened: what is read of it is gone.
            return False
        with self._opened(self._path) as file:
            return isinstance(file, io.BufferedReader)

    def __iter__(self) -> Iterator[T]:
        for number, _, line in self._lines():
            yield self._row(number, line)

    def __len__(self) -> int:
        """How many rows; the first call reads and checks all of them."""
        return len(self._indexed().offsets)

    def __getitem__(self, row: int) -> T:
        index = self._indexed()
        assert self._path is not None
        with self._opened(self._path) as file:
            if _identity(file) != index.identity:
                raise DataError("The file changed while it was used.", self.name)
            file.seek(index.offsets[row])
            return self._row(index.numbers[row], file.readline())

    def where(self, row: int) -> str:
        """The row's place for a message."""
        line = self._index.numbers[row] if self._index else None
        return f"{self.name}, line {line}" if line else f"{self.name}, row {row} (from 0)"

    def _indexed(self) -> _Index:
        """The index, made once; every row is parsed, so that a bad one is known before training begins."""
        if self._index is None:
            if self._path is None or not self.random_access:
                raise TypeError(f"{self.name} can be read in order only: use in_memory().")
            with self._opened(self._path) as file:
                index = _Index(_identity(file))
                for number, offset, line in self._of(file):
                    self._row(number, line)
                    index.offsets.append(offset)
                    index.numbers.append(number)
            self._index = index
        return self._index

    def _lines(self) -> Numbered:
        if self._path is not None:
            with self._opened(self._path) as opened:
                yield from self._of(opened)
            return
        if self._file is None:
            raise DataError("The open file was read before; give its path instead.", self.name)
        file, self._file = self._file, None
        yield from self._of(file)

    def _of(self, file: Lines) -> Numbered:
        """Number, offset and content of each line that is not blank."""
        number, offset = 0, 0
        lines: Iterable[bytes | str] = file
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"Cannot be read: {error}.", self.name, number + 1) from error

    def _row(self, number: int, line: bytes | str) -> T:
        try:
            # A byte order mark is what some editors begin a file with.
            text = line.decode("utf-8-sig") if isinstance(line, bytes) else line.lstrip("\ufeff")
            return self._parse(json.loads(text))
        except FieldError as error:
            raise DataError(error.why, self.name, number, error.field) from None
        except UnicodeDecodeError as error:
            raise DataError(f"Not UTF-8: {error}.", self.name, number) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"Not JSON: {error}.", self.name, number) from None

    def _opened(self, path: Path) -> io.BufferedReader | gzip.GzipFile:
        try:
            file = path.open("rb")
            if file.peek(2)[:2] != _GZIP:
                return file
            file.close()
            return gzip.open(path, "rb")
        except OSError as error:
            raise DataError(f"Cannot be read: {error.strerror or error}.", self.name) from error


class _Index:
    """Where the rows of a file begin, 16 bytes for each."""

    def __init__(self, identity: tuple[int, int]) -> None:
        self.identity = identity
        self.offsets = array("Q")
        self.numbers = array("Q")


def _identity(file: io.BufferedReader | gzip.GzipFile) -> tuple[int, int]:
    """Tells one state of a file from another."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
