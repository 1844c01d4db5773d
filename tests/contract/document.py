"""The OpenAPI document as the code makes it, before any server runs: one test per operation needs it then."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from flask import Flask

from deploy.docs_api import application


def make() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The document; and the method and path (in OpenAPI's spelling) of every route of the application."""
    with tempfile.TemporaryDirectory() as folder:
        app = application(Path(folder))
        with closing(app.extensions["signal"]):
            document = cast(dict[str, Any], json.loads(app.extensions["signal-openapi"]))
            return document, routes(app)


def routes(app: Flask) -> list[tuple[str, str]]:
    """Every route."""
    found = []
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        found += [(method, path) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}]
    return found
