"""Writes docs/errors.md from the one table of error codes, `schemas.errors`.

`make docs-errors` runs it; with `--check` it only says whether the page is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from schemas.errors import ERRORS, ErrorCode

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
HEAD = """# Error codes

Generated from `schemas/errors.py` by `make docs-errors`; edit that, not this page.

Every error answer is `{"error": {"code", "message", "param"?, "details"?, "retryable", "request_id"}}`.
A code that only the worker can know comes in the `error` of a failed future, with the status that the
sync form of the operation answers. `retryable` says whether the same request can succeed later.

| code | status | retryable | meaning |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    return HEAD + "".join(row(code) for code in ERRORS.values())


def row(code: ErrorCode) -> str:
    """One line of the table."""
    retryable = "no"
    if code.retryable:
        retryable = f"yes, after {code.retry_after_s} s" if code.retry_after_s else "yes"
    return f"| `{code.code}` | {code.status} | {retryable} | {code.meaning} |\n"


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    if arguments == ["--check"]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
