"""The index of artifacts in SQL. No Flask."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from gpu_pool.database import Database
from schemas.errors import SignalError
from web.artifacts.tables import ArtifactRow
from workers.storage import Storage, artifact_key

MANIFEST = "manifest.json"


def of_run(db: Database, run_id: str) -> list[ArtifactRow]:
    """A run's artifacts, oldest first."""
    query = select(ArtifactRow).where(ArtifactRow.run_id == run_id).order_by(ArtifactRow.id)
    with db.reading() as session:
        return list(session.scalars(query))


def file_of(db: Database, run_id: str, name: str, path: str) -> dict[str, Any]:
    """The manifest's line for a file. Raises SignalError not_found for what it does not list."""
    if not name.isprintable():
        # PostgreSQL refuses a NUL in a text.
        raise SignalError("not_found", "The run has no such artifact.")
    query = select(ArtifactRow).where(ArtifactRow.run_id == run_id, ArtifactRow.name == name)
    with db.reading() as session:
        row = session.scalar(query)
    if row is None:
        raise SignalError("not_found", "The run has no such artifact.")
    if path == MANIFEST:
        return {"path": MANIFEST, "sha256": None}
    for file in row.manifest["files"]:
        if file["path"] == path:
            return dict(file)
    raise SignalError("not_found", "The artifact has no such file.")


def add_projected(
    session: Session, run_id: str, seq: int, manifest: Mapping[str, Any], at: datetime
) -> None:
    """Note an artifact that an operation wrote; a repeat changes nothing."""
    known = select(ArtifactRow.id).where(
        ArtifactRow.run_id == run_id, ArtifactRow.name == manifest["name"]
    )
    if session.scalar(known) is None:
        session.add(
            ArtifactRow(
                run_id=run_id,
                name=manifest["name"],
                mode=manifest["mode"],
                seq=seq,
                step=manifest["step"],
                size_bytes=manifest["total_size_bytes"],
                manifest=dict(manifest),
                created_at=at,
            )
        )


def erase(db: Database, storage: Storage, run_id: str, name: str) -> None:
    """Delete one saved state: its files, then its line in the index. A repeat changes nothing."""
    storage.delete(artifact_key(run_id, name))
    with db.writing() as session:
        mine = (ArtifactRow.run_id == run_id, ArtifactRow.name == name)
        session.execute(delete(ArtifactRow).where(*mine))


def forget(session: Session, run_id: str) -> None:
    """Delete a run's entries in the index."""
    session.execute(delete(ArtifactRow).where(ArtifactRow.run_id == run_id))
