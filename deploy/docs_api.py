"""Writes docs/reference/api.md from the OpenAPI document: `make docs-reference`.

With `--check` it only says whether the page is up to date.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from flask import Flask

from web import create_app
from workers.settings import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "api.md"
METHODS = ("get", "post", "put", "patch", "delete")
HEAD = """# The REST API, path by path

Generated from the OpenAPI document by `make docs-reference`; a running server has it as `/openapi.json`,
and as a page to try things on at `/docs`.

Every request but the health checks needs `Authorization: Bearer KEY`. Every POST takes an
`Idempotency-Key`: a repeat with the same key and body gets the first answer. Every answer has an
`X-Request-Id`; every error has [one shape](../errors.md). A field that is not in a table below is
refused by name.
"""
Document = Mapping[str, Any]


def application(folder: Path) -> Flask:
    """The application over an empty folder and a Redis address that is never asked."""
    settings = Settings(
        data_dir=folder,
        redis_url="redis://127.0.0.1:1/0",
        database_url=f"sqlite:///{folder / 'signal.db'}",
        secret="never used",
        models_file=folder / "models.json",
    )
    return create_app(settings)


def document() -> dict[str, Any]:
    """The OpenAPI document as the code makes it; nothing is started."""
    with tempfile.TemporaryDirectory() as name:
        app = application(Path(name))
        with closing(app.extensions["signal"]):
            made: dict[str, Any] = json.loads(app.extensions["signal-openapi"])
            return made


def page() -> str:
    """The page's text."""
    found = document()
    schemas = found["components"]["schemas"]
    lines = [HEAD]
    used: dict[str, None] = {}
    for path, item in found["paths"].items():
        for method in METHODS:
            if method in item:
                lines += _operation(path, method, item[method], used)
    lines += ["\n# Objects"]
    seen: set[str] = set()
    while left := [name for name in used if name not in seen]:
        for name in left:
            seen.add(name)
            lines += _schema(name, schemas[name], used)
    return "\n".join(lines).rstrip() + "\n"


def _operation(path: str, method: str, operation: Document, used: dict[str, None]) -> Iterator[str]:
    yield f"\n## {method.upper()} {path}\n"
    yield " ".join(
        filter(None, (_sentence(operation.get("summary")), operation.get("description")))
    )
    queries = [one for one in operation.get("parameters", ()) if one.get("in") == "query"]
    if queries:
        yield "\n| query | type | |\n|---|---|---|"
        for one in queries:
            told = one.get("description") or one["schema"].get("description", "")
            yield f"| `{one['name']}` | {_type(one['schema'], used)} | {_cell(told)} |"
    if body := _json(operation.get("requestBody")):
        yield f"\nTakes {_type(body, used)}."
    yield ""
    for status, answer in operation["responses"].items():
        if status.startswith("2") and "$ref" not in answer:
            content = _json(answer)
            of = f": {_type(content, used)}" if content else ""
            yield f"- {status}{of} — {answer.get('description', '')}"
    errors = [status for status in operation["responses"] if status >= "4"]
    if errors:
        yield f"- errors: {', '.join(sorted(errors))}"


def _schema(name: str, schema: Document, used: dict[str, None]) -> Iterator[str]:
    yield f"\n## {name}\n"
    if told := schema.get("description"):
        yield f"{' '.join(told.split())}\n"
    required = set(schema.get("required", ()))
    yield "| field | type | |\n|---|---|---|"
    for field, one in schema.get("properties", {}).items():
        marks = [_cell(one.get("description", ""))]
        if "default" in one and one["default"] is not None:
            marks.append(f"Default: `{json.dumps(one['default'])}`.")
        if field in required and _is_request(name):
            marks.append("Required.")
        yield f"| `{field}` | {_type(one, used)} | {' '.join(filter(None, marks))} |"


def _is_request(name: str) -> bool:
    return name.endswith(("Request", "Create", "Post"))


def _type(schema: Document, used: dict[str, None]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        used[name] = None
        return f"[{name}](#{name.lower()})"
    for key in ("oneOf", "anyOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one, used) for one in schema[key]))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    kind = schema.get("type", "any")
    names = [one for one in (kind if isinstance(kind, list) else [kind]) if one != "null"]
    text = " or ".join(names) or "null"
    if text == "array":
        text = f"list of {_type(schema.get('items', {}), used)}"
    limits = [f"{sign} {schema[key]}" for key, sign in _LIMITS.items() if key in schema]
    return text + (f" ({', '.join(limits)})" if limits else "")


_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minItems": "at least",
    "maxItems": "at most",
    "minLength": "length ≥",
    "maxLength": "length ≤",
}


def _json(holder: Document | None) -> Document:
    found: Document = (
        (holder or {}).get("content", {}).get("application/json", {}).get("schema", {})
    )
    return found


def _sentence(text: str | None) -> str:
    return f"{text.rstrip('.')}." if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    if arguments == ["--check"]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
