"""What is wrong with data: which file, which line, which field."""

from __future__ import annotations


class FieldError(ValueError):
    """A wrong field of a row, before it is known which row that is."""

    def __init__(self, field: str | None, why: str) -> None:
        """`field` is a dotted path such as `messages.1.role`; None stands for the whole row."""
        super().__init__(why)
        self.field = field
        self.why = why


class DataError(ValueError):
    """A row that cannot be used.

    `source` is the file, `line` its line counted from 1, `field` the dotted path of the wrong field; each
    is None where it is not known.
    """

    def __init__(
        self,
        why: str,
        source: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        """`why` is a sentence."""
        place = [source, None if line is None else f"line {line}", field]
        told = ", ".join(part for part in place if part)
        super().__init__(f"{told}: {why}" if told else why)
        self.why, self.source, self.line, self.field = why, source, line, field

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str | None, int | None, str | None]]:
        # Pickle would call the class with the whole text alone.
        return DataError, (self.why, self.source, self.line, self.field)
