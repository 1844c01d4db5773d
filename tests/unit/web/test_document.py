"""The OpenAPI document and its page."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from schemas.errors import ERRORS

METHODS = ("get", "post", "delete", "put", "patch")


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    answer = client.get("/openapi.json")
    assert answer.mimetype == "application/json"
    return dict(json.loads(answer.data))


def _operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, item[method])
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]


def test_it_is_openapi_3_1_and_covers_every_route(
    document: dict[str, Any], client: FlaskClient
) -> None:
    assert document["openapi"].startswith("3.1")
    rules = {
        re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for rule in client.application.url_map.iter_rules()
        # Beside the pages, another's protocol, which has no place in this document.
        if not rule.endpoint.startswith(("docs.", "tinker"))
    }
    assert set(document["paths"]) == rules


def test_every_operation_is_described_and_its_errors_have_the_one_shape(
    document: dict[str, Any],
) -> None:
    ids = []
    for path, method, operation in _operations(document):
        where = f"{method} {path}"
        assert operation.get("summary"), where
        assert operation.get("tags"), where
        ids.append(operation.get("operationId", where))
        for status, response in operation["responses"].items():
            if int(status) >= 400 and status != "414":
                assert response == {"$ref": f"#/components/responses/Error{status}"}, where
        public = operation.get("security") == []
        assert public == (path in ("/health", "/ready")), where
        assert public or "401" in operation["responses"], where
        if method == "post":
            names = {parameter.get("name") for parameter in operation["parameters"]}
            assert "Idempotency-Key" in names, where
    assert len(ids) == len(set(ids))
    assert document["security"] == [{"bearer": []}]


def test_every_status_of_the_table_is_described(document: dict[str, Any]) -> None:
    responses = document["components"]["responses"]
    for row in ERRORS.values():
        response = responses[f"Error{row.status}"]
        assert row.code in response["description"]
        schema = response["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        found: Any = document
        for part in reference.split("/"):
            found = found[part]
        assert found


def test_request_schemas_refuse_unknown_fields(document: dict[str, Any]) -> None:
    for path, method, operation in _operations(document):
        if "requestBody" not in operation:
            continue
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rsplit("/", 1)[1]
        found = document["components"]["schemas"][name]
        assert found.get("additionalProperties") is False, f"{method} {path}: {name}"


def test_the_page_works_without_a_network(client: FlaskClient) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    for link in re.findall(r'(?:src|href)="([^"]+)"', page):
        answer = client.get("/" + link)
        assert answer.status_code == 200
        assert len(answer.data) > 100
    assert client.get("/docs/package.json").status_code == 404
    assert client.get("/docs/..%2f__init__.py").status_code == 404
