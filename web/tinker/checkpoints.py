"""Checkpoints: names of the SDK for artifacts of a run, `tinker://MODEL/KIND/NAME`.

The newest artifact that was saved under a name and is still there is what the name stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, select

from gpu_pool.database import Database
from schemas.errors import SignalError
from web.artifacts import service as artifacts
from web.context import services, user
from web.history.saved import Saved, check_fits, find_saved
from web.tinker.tables import EXTERNAL, LIVE, SAMPLER, TRAINING, CheckpointRow, ModelRow, SessionRow
from workers.storage import artifact_key
from workers.storage.protocol import MANIFEST

SCHEME = "tinker://"
TYPES = {TRAINING: "training", SAMPLER: "sampler", EXTERNAL: "external"}
_LETTER = {TRAINING: "w", SAMPLER: "s", EXTERNAL: "x", LIVE: "live"}
NO_CHECKPOINT = "There is no such checkpoint, or it is not yours, or it has expired."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with the model that saved it and who owns that."""

    row: CheckpointRow
    model: ModelRow
    owner: str

    @property
    def path(self) -> str:
        """Its name everywhere."""
        return f"{SCHEME}{self.model.model_id}/{self.row.kind}/{self.row.name}"

    @property
    def key(self) -> str:
        """Where its files are."""
        return artifact_key(self.row.run_id, self.row.artifact)

    def stored(self) -> bool:
        """Whether it was saved, and not deleted since."""
        return services().storage.stat(f"{self.key}/{MANIFEST}") is not None

    def saved(self) -> Saved:
        """The artifact. Raises SignalError not_found or state_mismatch."""
        return find_saved(services().storage, self.row.run_id, self.row.artifact, "path")


def artifact_name(kind: str, name: str, seq: int) -> str:
    """What the operation at `seq` of the lane saves: the same for a repeat."""
    letter = _LETTER[kind]
    return f"{letter}.{seq}" if kind == LIVE else f"{name}.{letter}{seq}"


def note(run_id: str, kind: str, name: str, seq: int, **facts: Any) -> str:
    """Note what an operation is about to save; the artifact's name. A repeat changes nothing."""
    artifact = artifact_name(kind, name, seq)
    ttl = facts.pop("ttl_seconds", None)
    with services().db.writing() as session:
        known = select(CheckpointRow.id).where(
            CheckpointRow.run_id == run_id, CheckpointRow.seq == seq
        )
        if session.scalar(known) is None:
            row = CheckpointRow(
                run_id=run_id, kind=kind, name=name, seq=seq, artifact=artifact, public=False,
                expires_at=_expiry(ttl), **facts,
            )  # fmt: skip
            session.add(row)
    return artifact


def _expiry(ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else datetime.now(UTC) + timedelta(seconds=ttl_seconds)


def of_artifact(db: Database, run_id: str, artifact: str) -> Checkpoint | None:
    """The checkpoint that an operation has saved."""
    query = _joined().where(CheckpointRow.run_id == run_id, CheckpointRow.artifact == artifact)
    return next(_found(db, query), None)


def parse(path: str, param: str = "path") -> tuple[str, str, str]:
    """Model, kind and name. Raises SignalError validation_error."""
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in TYPES:
        text = "A path of the form tinker://MODEL/weights/NAME or …/sampler_weights/NAME is needed."
        raise SignalError("validation_error", text, param=param)
    return parts[0], parts[1], parts[2]


def find(path: str, param: str = "path") -> Checkpoint:
    """A checkpoint that the caller may read: one's own, or a public one. Raises SignalError not_found."""
    found = lookup(*parse(path, param))
    if found is None or (found.owner != user().id and not found.row.public):
        raise SignalError("not_found", NO_CHECKPOINT, param=param)
    return found


def own(model_id: str, kind: str, name: str) -> Checkpoint:
    """The caller's checkpoint. Raises SignalError not_found."""
    found = lookup(model_id, kind, name)
    if found is None or found.owner != user().id:
        raise SignalError("not_found", NO_CHECKPOINT, param="path")
    return found


def lookup(model_id: str, kind: str, name: str) -> Checkpoint | None:
    """The newest that is stored under a name, whoever's."""
    if not (model_id + kind + name).isprintable():
        return None
    query = _joined().where(
        ModelRow.model_id == model_id, CheckpointRow.kind == kind, CheckpointRow.name == name
    )
    every = _found(services().db, query.order_by(CheckpointRow.id.desc()))
    return next((one for one in every if one.stored()), None)


def of_user(db: Database, user_id: str, model_id: str | None = None) -> list[Checkpoint]:
    """A user's checkpoints (of one model), newest first, one for each name."""
    query = _joined().where(SessionRow.user_id == user_id, CheckpointRow.kind != LIVE)
    if model_id is not None:
        query = query.where(ModelRow.model_id == model_id)
    found: dict[str, Checkpoint] = {}
    for one in _found(db, query.order_by(CheckpointRow.id.desc())):
        if one.path not in found and one.stored():
            found[one.path] = one
    return list(found.values())


def _joined() -> Select[CheckpointRow, ModelRow, str]:
    return (
        select(CheckpointRow, ModelRow, SessionRow.user_id)
        .join(ModelRow, ModelRow.run_id == CheckpointRow.run_id)
        .join(SessionRow, SessionRow.session_id == ModelRow.session_id)
    )


def _found(db: Database, query: Select[CheckpointRow, ModelRow, str]) -> Iterator[Checkpoint]:
    with db.reading() as session:
        rows = session.execute(query).all()
    now = datetime.now(UTC)
    for found in rows:
        checkpoint = Checkpoint(*found)
        expires_at = checkpoint.row.expires_at
        if expires_at is None or expires_at > now:
            yield checkpoint


def change(checkpoint: Checkpoint, **values: Any) -> None:
    """Change what is noted of a checkpoint: `public`, or `ttl_seconds` from now on."""
    if "ttl_seconds" in values:
        values["expires_at"] = _expiry(values.pop("ttl_seconds"))
    with services().db.writing() as session:
        row = session.get_one(CheckpointRow, checkpoint.row.id)
        for name, value in values.items():
            setattr(row, name, value)


def delete(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint and its artifact, and what was saved under its name before."""
    row = checkpoint.row
    with services().db.reading() as session:
        older = session.scalars(
            select(CheckpointRow).where(
                CheckpointRow.run_id == row.run_id,
                CheckpointRow.kind == row.kind,
                CheckpointRow.name == row.name,
            )
        ).all()
    for one in older:
        artifacts.erase(services().db, services().storage, one.run_id, one.artifact)
        with services().db.writing() as session:
            session.delete(session.get_one(CheckpointRow, one.id))


def fitting(saved: Saved, config: Mapping[str, Any], *, optimizer: bool) -> None:
    """Raises SignalError state_mismatch for what a run of this configuration cannot begin from."""
    model = services().catalogue.entry(saved.manifest["base_model"])
    check_fits(saved, config, model, optimizer=optimizer)
