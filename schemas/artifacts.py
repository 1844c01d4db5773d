"""Artifacts: what save_state and complete wrote."""

from __future__ import annotations

from marshmallow import fields

from schemas.fields import Output, rfc3339


class ArtifactFile(Output):
    """A file of an artifact."""

    path = fields.String(required=True)
    size_bytes = fields.Integer(required=True)
    sha256 = fields.String(required=True)
    url = fields.String(
        required=True, metadata={"description": "Path under the base URL; takes Range requests."}
    )


class Artifact(Output):
    """One saved state."""

    object = fields.String(required=True, metadata={"enum": ["artifact"]})
    name = fields.String(required=True)
    mode = fields.String(required=True)
    seq = fields.Integer(required=True)
    step = fields.Integer(required=True)
    size_bytes = fields.Integer(required=True)
    created_at = rfc3339(required=True)
    files = fields.List(fields.Nested(ArtifactFile), required=True)
    manifest = fields.Dict(required=True)


class ArtifactList(Output):
    """GET /runs/{id}/artifacts, oldest first; `artifacts` is `data` under the original's name."""

    object = fields.String(required=True, metadata={"enum": ["list"]})
    run_id = fields.String(required=True)
    data = fields.List(fields.Nested(Artifact), required=True)
    artifacts = fields.List(fields.Nested(Artifact), required=True)
