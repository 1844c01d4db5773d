"""Downloads of a checkpoint's files by signed addresses, which need no key and are good for an hour."""

from __future__ import annotations

import hashlib
import hmac
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from flask import Response, request

from schemas.errors import SignalError
from web.artifacts.views import stream_file
from web.context import services
from web.tinker.checkpoints import Checkpoint
from workers.storage import artifact_key

GOOD_FOR_S = 3600
PREFIX = "/api/v1/external_weights"


def urls(checkpoint: Checkpoint) -> dict[str, Any]:
    """An address for each file."""
    until = int(time.time()) + GOOD_FOR_S
    row, host = checkpoint.row, request.host_url.rstrip("/")
    found = {}
    for file in checkpoint.saved().manifest["files"]:
        where = f"{row.run_id}/{row.artifact}/{until}"
        mark = _mark(f"{where}/{file['path']}")
        found[file["path"]] = f"{host}{PREFIX}/{where}/{mark}/{quote(file['path'])}"
    expires = datetime.fromtimestamp(until, UTC).isoformat().replace("+00:00", "Z")
    return {"urls": found, "expires": expires}


def file(run_id: str, artifact: str, until: int, mark: str, path: str) -> Response:
    """A file by its signed address. Raises SignalError not_found."""
    expected = _mark(f"{run_id}/{artifact}/{until}/{path}")
    if not hmac.compare_digest(mark.encode(), expected.encode()) or until < time.time():
        raise SignalError("not_found", "The address is not good, or not any more.")
    return stream_file(f"{artifact_key(run_id, artifact)}/{path}", {"path": path, "sha256": None})


def _mark(text: str) -> str:
    secret = f"tinker-files|{services().settings.secret}".encode()
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]
