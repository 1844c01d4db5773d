"""What commands print: tables, facts, JSON, times. Plain text; style and cutting only on a terminal.

Off a terminal nothing is cut to a width that nobody has, and no control sequence is written; NO_COLOR
keeps them from a terminal too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click

GAP = "  "
# No column but the first gets narrower than this.
NARROWEST = 6


def emit(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def emit_line(value: Any) -> None:
    """One JSON document of a stream, on a line of its own, at once."""
    click.echo(json.dumps(value, ensure_ascii=False))
    sys.stdout.flush()


def note(text: str) -> None:
    """Something for a reader's eyes, beside the output."""
    click.echo(text, err=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns under their names."""
    lines = table([head, *rows], terminal_width())
    click.echo(styled(lines[0], bold=True))
    for line in lines[1:]:
        click.echo(line)


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one pair a line; those that are None are left out."""
    for line in table([pair for pair in facts if pair[1] is not None], terminal_width()):
        click.echo(line)


def table(rows: Sequence[Sequence[Any]], width: int | None) -> list[str]:
    """The rows as lines with aligned columns, cut to `width` cells if that is given.

    The first column is cut last: it is what the other commands take.
    """
    texts = [[printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(*texts, strict=True)]
    if width is not None:
        widths = _narrowed(widths, width)
    lines = [GAP.join(map(fit, row, widths)).rstrip() for row in texts]
    return lines if width is None else [fit(line, width).rstrip() for line in lines]


def _narrowed(widths: list[int], width: int) -> list[int]:
    widths = list(widths)
    while sum(widths) + len(GAP) * (len(widths) - 1) > width and len(widths) > 1:
        widest = max(range(1, len(widths)), key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def fit(text: str, width: int) -> str:
    """The text in exactly `width` cells: filled up, or cut with an ellipsis."""
    if cells(text) <= width:
        return text + " " * (width - cells(text))
    kept = ""
    for character in text:
        if cells(kept + character) > width - 1:
            break
        kept += character
    return f"{kept}…".ljust(width - cells(kept) - 1 + len(kept) + 1)


def cells(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("F", "W") else 1


def printable(text: str, keep: str = "") -> str:
    """The text without control characters but those in `keep`: names and samples are others' words,
    and must not move a cursor."""
    return "".join(
        one if one in keep or unicodedata.category(one) not in ("Cc", "Cs") else "�" for one in text
    )


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None off a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def styled(text: str, **style: Any) -> str:
    """The text in a style, on a terminal without NO_COLOR."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stdout.isatty() else click.style(text, **style)


def local_time(stamp: str | None) -> str | None:
    """A time of the server, in the reader's time zone and to the second."""
    if stamp is None:
        return None
    return f"{datetime.fromisoformat(stamp).astimezone():%Y-%m-%d %H:%M:%S}"


def seconds_between(start: str | None, end: str | None) -> float | None:
    """Seconds from one time of the server to another."""
    if start is None or end is None:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
