"""Completes the OpenAPI document that flask-smorest makes from the views. Pure functions on a dict.

What holds for every operation is said here once: authentication, the errors that any request can get,
the idempotency key of every POST, and the headers of every answer.
"""

from __future__ import annotations

from typing import Any

from schemas.errors import ERRORS

_METHODS = ("get", "post", "put", "patch", "delete")
_ALL = (400, 401, 405, 500, 503)
_PUBLIC = (405, 500, 503)
_WITH_BODY = (413, 415, 422)
_WITH_ID = (404,)
_EXTRA: dict[str, dict[str, tuple[int, ...]]] = {
    "/runs": {"post": (404, 409, 429)},
    "/futures": {"get": (404, 410, 429)},
    "/futures/{future_id}": {"get": (410, 429), "delete": (409, 410)},
    "/runs/{run_id}": {"delete": (409,)},
    "/runs/{run_id}/operations": {"get": (429,)},
    "/runs/{run_id}/events": {"get": (429,)},
    "/runs/{run_id}/certificate": {"get": (409, 410, 424, 429)},
    "/runs/{run_id}/artifacts/{name}/files/{path}": {"get": (416,)},
}
# An operation can end in any error that a worker or the journal knows.
_OPERATION = (409, 410, 424, 429)


# What generated clients call an operation. The primitives name themselves.
_IDS = {
    "get /runs": "list_runs",
    "post /runs": "create_run",
    "get /runs/{run_id}": "get_run",
    "delete /runs/{run_id}": "delete_run",
    "get /runs/{run_id}/status": "get_run_status",
    "post /runs/{run_id}/pause": "pause_run",
    "post /runs/{run_id}/resume": "resume_run",
    "post /runs/{run_id}/branch": "branch_run",
    "post /runs/{run_id}/replay": "replay_run",
    "post /runs/{run_id}/migrate": "migrate_run",
    "get /runs/{run_id}/certificate": "get_certificate",
    "get /runs/{run_id}/events": "list_events",
    "get /runs/{run_id}/session_state": "get_session_state",
    "post /runs/{run_id}/complete": "complete_run",
    "post /runs/{run_id}/cancel": "cancel_run",
    "get /runs/{run_id}/operations": "list_operations",
    "post /runs/{run_id}/operations": "submit_operations",
    "get /futures/{future_id}": "get_future",
    "delete /futures/{future_id}": "cancel_future",
    "get /futures": "list_futures",
    "post /runs/{run_id}/tokenize": "tokenize",
    "post /runs/{run_id}/detokenize": "detokenize",
    "post /runs/{run_id}/apply_chat_template": "apply_chat_template",
    "get /runs/{run_id}/tokenizer_info": "get_tokenizer_info",
    "get /runs/{run_id}/model_info": "get_model_info",
    "get /runs/{run_id}/metrics": "list_metrics",
    "post /runs/{run_id}/metrics": "log_metrics",
    "get /runs/{run_id}/artifacts": "list_artifacts",
    "get /runs/{run_id}/artifacts/{name}/files/{path}": "download_file",
    "get /models": "list_models",
    "get /models/{name}/tokenizer": "get_tokenizer_files",
    "get /me": "get_account",
    "get /health": "health",
    "get /ready": "ready",
}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what is common to all operations; changes and returns `document`."""
    components = document.setdefault("components", {})
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key: sk-signal-…"}
    }
    document["security"] = [{"bearer": []}]
    responses = components.setdefault("responses", {})
    responses.pop("UNPROCESSABLE_ENTITY", None)
    responses.pop("DEFAULT_ERROR", None)
    for status in sorted({row.status for row in ERRORS.values()}):
        responses[f"Error{status}"] = error_response(status)
    components["headers"] = {
        "RequestId": {"description": "Names the request in the logs.", "schema": {"type": "string"}}
    }
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                _complete_operation(path, method, item[method], bool(item.get("parameters")))
                _relax_body(item[method], components["schemas"])
    return document


def error_response(status: int) -> dict[str, Any]:
    """The response object of an error status: the codes that come with it, in one shape."""
    rows = [row for row in ERRORS.values() if row.status == status]
    body = {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}
    headers: dict[str, Any] = {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}}
    if any(row.retry_after_s is not None for row in rows):
        headers["Retry-After"] = {
            "description": "Seconds after which to try again.",
            "schema": {"type": "integer"},
        }
    return {
        "description": " ".join(f"`{row.code}`: {row.meaning}" for row in rows),
        "headers": headers,
        "content": {"application/json": body},
    }


def _complete_operation(path: str, method: str, operation: dict[str, Any], has_id: bool) -> None:
    if (named := _IDS.get(f"{method} {path}")) is not None:
        operation.setdefault("operationId", named)
    responses = operation.setdefault("responses", {})
    responses.pop("default", None)
    responses.pop("422", None)
    public = operation.get("security") == []
    statuses = set(_PUBLIC if public else _ALL)
    if has_id or "{" in path:
        statuses.update(_WITH_ID)
    if "requestBody" in operation:
        statuses.update(_WITH_BODY)
    if operation.get("parameters"):
        statuses.add(422)
        # Of the HTTP server itself, before the application sees the request.
        responses["414"] = {"description": "The URL is too long.", "content": {"text/html": {}}}
    if f"{method} {path}" == _STREAMED:
        operation["parameters"].append(_LAST_EVENT_ID)
    if method == "post":
        statuses.update(_OPERATION if path != "/runs" else (), (409, 422, 429))
        operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
    statuses.update(_EXTRA.get(path, {}).get(method, ()))
    for status in statuses:
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Error{status}"})
    for response in responses.values():
        if "$ref" not in response:
            response.setdefault("headers", {})["X-Request-Id"] = {
                "$ref": "#/components/headers/RequestId"
            }


def _relax_body(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """A body of which nothing is required may be left out."""
    if "requestBody" in operation:
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = schemas[reference.rsplit("/", 1)[1]]
        operation["requestBody"]["required"] = bool(schema.get("required"))


_STREAMED = "get /runs/{run_id}/events"
_LAST_EVENT_ID = {
    "in": "header",
    "name": "Last-Event-ID",
    "required": False,
    "description": "The last event that was received; of this and `after` the greater counts.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 2**53},
}
_IDEMPOTENCY_KEY = {
    "in": "header",
    "name": "Idempotency-Key",
    "required": False,
    "description": "A repeat with the same key and body gets the first answer; with another body, 409.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
