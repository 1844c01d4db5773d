"""GET /openapi.json and GET /docs: Swagger UI from the files of an installed package."""

from __future__ import annotations

import json
from importlib import resources

from flask import Blueprint, Flask, Response, current_app
from flask_smorest import Api

from schemas.errors import SignalError
from schemas.service import ErrorEnvelope
from web.answers import raw_answer
from web.docs.document import complete

blp = Blueprint("docs", __name__)

_ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Signal API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
});
"""
# Nothing from elsewhere: the page works without a network, and no other site can frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def register_document(app: Flask, api: Api) -> None:
    """Make the document once, when all views are registered."""
    if "ErrorEnvelope" not in api.spec.components.schemas:
        api.spec.components.schema("ErrorEnvelope", schema=ErrorEnvelope)
    document = complete(api.spec.to_dict())
    app.extensions["signal-openapi"] = json.dumps(document, allow_nan=False).encode()


@blp.get("/openapi.json")
def openapi() -> Response:
    """The OpenAPI document."""
    return raw_answer(current_app.extensions["signal-openapi"])


@blp.get("/docs")
def page() -> Response:
    """The page."""
    response = Response(_PAGE, mimetype="text/html")
    response.headers["Content-Security-Policy"] = _POLICY
    return response


@blp.get("/docs/start.js")
def start() -> Response:
    """What starts the page, in a file of its own because the page allows no inline script."""
    return Response(_START, mimetype="text/javascript")


@blp.get("/docs/<name>")
def asset(name: str) -> Response:
    """A file of Swagger UI."""
    if name not in _ASSETS:
        raise SignalError("not_found", "There is no such path.")
    source = resources.files("flask_swagger_ui") / "dist" / name
    response = Response(source.read_bytes(), mimetype=_ASSETS[name])
    response.headers["Cache-Control"] = "public, max-age=3600"
    return response
