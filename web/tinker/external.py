"""Downloads of a checkpoint's files by signed addresses, which need no key and are good for an hour."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from flask import Response, request, send_file

from schemas.errors import SignalError
from web.artifacts.views import stream_file
from web.context import services
from web.tinker import encryption
from web.tinker.checkpoints import Checkpoint, of_artifact
from workers.storage import artifact_key

GOOD_FOR_S = 3600
PREFIX = "/api/v1/external_weights"


def urls(checkpoint: Checkpoint) -> dict[str, Any]:
    """An address for each file."""
    until = int(time.time()) + GOOD_FOR_S
    row, host = checkpoint.row, request.host_url.rstrip("/")
    suffix = encryption.SUFFIX if encryption.recipients_of(row) else ""
    found = {}
    for file in checkpoint.saved().manifest["files"]:
        where, path = f"{row.run_id}/{row.artifact}/{until}", f"{file['path']}{suffix}"
        found[path] = f"{host}{PREFIX}/{where}/{_mark(f'{where}/{path}')}/{quote(path)}"
    expires = datetime.fromtimestamp(until, UTC).isoformat().replace("+00:00", "Z")
    return {"urls": found, "expires": expires}


def file(run_id: str, artifact: str, until: int, mark: str, path: str) -> Response:
    """A file by its signed address. Raises SignalError not_found."""
    expected = _mark(f"{run_id}/{artifact}/{until}/{path}")
    if not hmac.compare_digest(mark.encode(), expected.encode()) or until < time.time():
        raise SignalError("not_found", "The address is not good, or not any more.")
    checkpoint = of_artifact(services().db, run_id, artifact)
    recipients = encryption.recipients_of(checkpoint.row) if checkpoint else []
    key = f"{artifact_key(run_id, artifact)}/{path}"
    if not recipients:
        return stream_file(key, {"path": path, "sha256": None})
    return _sent(encryption.encrypted(key.removesuffix(encryption.SUFFIX), recipients), path)


def _sent(content: BinaryIO, path: str) -> Response:
    """Whole: the next encryption of the same file has other bytes, so no range of it is worth anything."""
    kind, name = "application/octet-stream", PurePosixPath(path).name
    response: Response = send_file(content, mimetype=kind, as_attachment=True, download_name=name)
    response.content_length = os.fstat(content.fileno()).st_size
    return response


def _mark(text: str) -> str:
    secret = f"tinker-files|{services().settings.secret}".encode()
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]
