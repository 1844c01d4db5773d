"""Records for people: a line for terminals, HTML for notebooks. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

LONGEST = 300
# Of a list in a line, and of a text.
FEW, SHORT = 6, 60
MOST_ROWS = 20


def line_of(title: str, fields: Iterable[tuple[str, Any]]) -> str:
    """A record in a line; long lists and texts are cut."""
    return f"{title}({', '.join(f'{name}={_brief(value)}' for name, value in fields)})"


def _brief(value: Any) -> str:
    if isinstance(value, str) and len(value) > SHORT:
        return f"{value[:SHORT]!r}…"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        more = f", … {len(value) - FEW} more" if len(value) > FEW else ""
        return f"[{', '.join(map(_brief, value[:FEW]))}{more}]"
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {_brief(one)}" for key, one in value.items()) + "}"
    return repr(value)


def html_of(title: str, fields: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; what is nested is a table within."""
    return f"<table><caption>{escape(title)}</caption>{_rows(fields)}</table>"


def _rows(fields: Iterable[tuple[str, Any]]) -> str:
    return "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{_cell(value)}</td></tr>"
        for name, value in fields
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"<table>{_rows(value.items())}</table>" if value else ""
    if isinstance(value, str):
        return f"<code style='white-space:pre-wrap'>{escape(_short(value))}</code>"
    if isinstance(value, Sequence):
        return _listed(value)
    return escape(_short(f"{value:.6g}" if isinstance(value, float) else str(value)))


def _listed(values: Sequence[Any]) -> str:
    if not any(isinstance(value, Mapping | str) for value in values):
        return escape(_short(str(list(values))))
    shown = "".join(f"<li>{_cell(value)}</li>" for value in values[:MOST_ROWS])
    left = len(values) - MOST_ROWS
    more = f"<li>… {left} more</li>" if left > 0 else ""
    return f"<ol>{shown}{more}</ol>"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
