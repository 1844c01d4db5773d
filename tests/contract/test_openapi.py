"""The document itself: valid OpenAPI 3.1, complete, and what a running server gives."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest
import schemathesis

from tests.contract import document as documents
from tests.support.stack import RunningStack

METHODS = ("get", "post", "put", "patch", "delete")
PUBLIC = ("/health", "/ready")

DOCUMENT, ROUTES = documents.make()
OPERATIONS = [
    (f"{method.upper()} {path}", item[method])
    for path, item in DOCUMENT["paths"].items()
    for method in METHODS
    if method in item
]
each_operation = pytest.mark.parametrize(
    ("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS]
)


def test_it_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    # Raises with the place of what is wrong, by the specification's own JSON Schema.
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_its_patterns_are_regular_expressions_of_json_schema() -> None:
    """ECMA-262 knows no \\A, no \\Z and no inline flags."""
    for pattern in _values(DOCUMENT, "pattern"):
        assert not re.search(r"\\[AZz]|\(\?[a-zP]", pattern), pattern
        assert pattern.startswith("^") and pattern.endswith("$"), pattern


def test_every_route_is_in_it_and_nothing_else() -> None:
    pages = {"/openapi.json", "/docs", "/docs/{name}", "/docs/start.js"}
    # Another's protocol, which docs/tinker.md measures against its own SDK.
    routes = {
        f"{method} {path}"
        for method, path in ROUTES
        if path not in pages and not path.startswith("/api/v1/")
    }
    assert {name for name, _ in OPERATIONS} == routes


def test_operation_ids_are_names_and_unique() -> None:
    ids = [operation.get("operationId", "") for _, operation in OPERATIONS]
    assert [one for one in ids if not re.fullmatch("[a-z][a-z_]*", one)] == []
    assert len(set(ids)) == len(ids)


@each_operation
def test_an_operation_is_described(name: str, operation: dict[str, Any]) -> None:
    assert operation["summary"][0].isupper()
    assert not operation["summary"].endswith(".")
    assert operation["tags"]
    assert any(status.startswith("2") for status in operation["responses"])
    for parameter in operation.get("parameters", ()):
        assert parameter["schema"], parameter


@each_operation
def test_an_operation_names_its_errors_and_who_may_call_it(
    name: str, operation: dict[str, Any]
) -> None:
    method, path = name.split()
    responses, public = set(operation["responses"]), path in PUBLIC
    expected = {"500", "503", "405"} | (set() if public else {"401", "400"})
    if "{" in path:
        expected |= {"404"}
    if method == "POST":
        expected |= {"409", "413", "415", "422"}
    assert expected <= responses, expected - responses
    security = operation.get("security", DOCUMENT["security"])
    assert security == ([] if public else [{"bearer": []}])


def test_a_running_server_gives_this_document_to_everybody(stack: RunningStack) -> None:
    answer = httpx2.get(f"{stack.base_url}/openapi.json", trust_env=False)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == DOCUMENT


class Links(HTMLParser):
    """Collects what a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_works_without_a_network(stack: RunningStack) -> None:
    url = f"{stack.base_url}/docs"
    page = httpx2.get(url, trust_env=False)
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    links = Links(page.text).found
    assert links
    for link in links:
        target = urljoin(url, link)
        assert urlsplit(target).netloc == urlsplit(url).netloc, f"{link} is elsewhere"
        answer = httpx2.get(target, trust_env=False)
        assert answer.status_code == 200, link
        assert answer.content, link
    script = httpx2.get(f"{url}/start.js", trust_env=False).text
    assert 'url: "openapi.json"' in script
    assert "http" not in script.replace('"openapi.json"', "")


def _values(node: Any, key: str) -> list[str]:
    """Every value under `key` in any depth of the document."""
    if isinstance(node, list):
        return [value for item in node for value in _values(item, key)]
    if not isinstance(node, dict):
        return []
    own = [node[key]] if isinstance(node.get(key), str) else []
    return own + [value for item in node.values() for value in _values(item, key)]
