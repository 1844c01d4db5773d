"""GET /runs/{id}/artifacts and the files of an artifact."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from flask import Response, request, send_file
from flask.views import MethodView

from schemas.artifacts import ArtifactList
from schemas.errors import SignalError
from web.answers import encode, raw_answer, rfc3339
from web.artifacts import service
from web.artifacts.tables import ArtifactRow
from web.context import services
from web.parsing import Blueprint
from web.runs.projection import wait_for_projection
from web.runs.views import own_run
from workers.storage import artifact_key

blp = Blueprint("artifacts", __name__, description="What a run has saved.")


@blp.route("/runs/<run_id>/artifacts")
class ArtifactsView(MethodView):
    """The saved states of a run."""

    @blp.response(200, ArtifactList, description="The artifacts, oldest first.")
    def get(self, run_id: str) -> Response:
        """List a run's artifacts"""
        row, head = own_run(run_id)
        wait_for_projection(services().db, row, head)
        data = encode([artifact_body(one) for one in service.of_run(services().db, run_id)])
        start = encode({"object": "list", "run_id": run_id})[:-1]
        return raw_answer(start + b',"data":' + data + b',"artifacts":' + data + b"}")


@blp.route("/runs/<run_id>/artifacts/<name>/files/<path:path>")
class ArtifactFileView(MethodView):
    """A file of a saved state."""

    @blp.response(
        200, {"type": "string", "format": "binary"},
        content_type="application/octet-stream", description="The file.",
    )  # fmt: skip
    @blp.alt_response(
        206, schema={"type": "string", "format": "binary"},
        content_type="application/octet-stream", success=True, description="The asked-for range.",
    )  # fmt: skip
    def get(self, run_id: str, name: str, path: str) -> Response:
        """Download a file of an artifact

        Takes `Range` requests, so a broken download can go on. The ETag is the file's SHA-256.
        """
        row, head = own_run(run_id)
        wait_for_projection(services().db, row, head)
        file = service.file_of(services().db, run_id, name, path)
        return stream_file(f"{artifact_key(run_id, name)}/{file['path']}", file)


def stream_file(key: str, file: dict[str, Any]) -> Response:
    """A stored file as a download, whole or a range. Raises SignalError not_found."""
    storage = services().storage
    info = storage.stat(key)
    if info is None:
        raise SignalError("not_found", "The file is not in storage any more.")
    response: Response = send_file(
        storage.open(key),
        mimetype="application/octet-stream",
        as_attachment=True,
        download_name=PurePosixPath(file["path"]).name,
        conditional=False,
        etag=False,
    )
    response.content_length = info.size
    if file["sha256"]:
        response.set_etag(file["sha256"])
    response.last_modified = info.modified_at  # type: ignore[assignment]
    response.make_conditional(request.environ, accept_ranges=True, complete_length=info.size)
    return response


def artifact_body(row: ArtifactRow) -> dict[str, Any]:
    """The wire form of an artifact."""
    return {
        "object": "artifact",
        "name": row.name,
        "mode": row.mode,
        "seq": row.seq,
        "step": row.step,
        "size_bytes": row.size_bytes,
        "created_at": rfc3339(row.created_at),
        "files": [_file_body(row, file) for file in row.manifest["files"]],
        "manifest": row.manifest,
    }


def _file_body(row: ArtifactRow, file: dict[str, Any]) -> dict[str, Any]:
    url = f"/runs/{row.run_id}/artifacts/{quote(row.name)}/files/{quote(file['path'])}"
    names = ("path", "size_bytes", "sha256")
    return {**{name: file[name] for name in names}, "url": url}
