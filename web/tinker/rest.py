"""Training runs, checkpoints and sessions as the SDK's RestClient lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from schemas.errors import SignalError
from web.answers import rfc3339
from web.context import services, user
from web.runs.access import runs
from web.tinker import checkpoints, models, sessions
from web.tinker.checkpoints import TYPES, Checkpoint
from web.tinker.tables import SAMPLER, TRAINING, ModelRow, SessionRow


def cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    """Where a page is."""
    return {"offset": offset, "limit": limit, "total_count": total}


def texts(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """A user's metadata as texts, which is what the SDK reads back."""
    if metadata is None:
        return None
    return {
        name: value if isinstance(value, str) else repr(value) for name, value in metadata.items()
    }


def checkpoint_body(checkpoint: Checkpoint) -> dict[str, Any]:
    """One checkpoint."""
    row, manifest = checkpoint.row, checkpoint.saved().manifest
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": TYPES[row.kind],
        "time": manifest["created_at"],
        "tinker_path": checkpoint.path,
        "size_bytes": manifest["total_size_bytes"],
        "public": row.public,
        "user_metadata": texts(row.user_metadata),
        "expires_at": rfc3339(row.expires_at),
    }


def checkpoints_of(model_id: str | None) -> list[dict[str, Any]]:
    """The caller's checkpoints (of one model), newest first; one that is damaged is left out."""
    found = []
    for one in checkpoints.of_user(services().db, user().id, model_id):
        try:
            found.append(checkpoint_body(one))
        except SignalError:
            continue
    return found


def training_run(row: ModelRow) -> dict[str, Any]:
    """One model as a training run."""
    mine = checkpoints_of(row.model_id)
    run = runs().get(row.run_id)
    head = services().journal.head(row.run_id)
    return {
        "training_run_id": row.model_id,
        "base_model": run.base_model,
        "model_owner": user().name,
        "is_lora": True,
        "corrupted": run.status == "failed",
        "lora_rank": run.config["lora_r"],
        "last_request_time": rfc3339(head.last_activity if head else run.updated_at),
        "last_checkpoint": _first(mine, TRAINING),
        "last_sampler_checkpoint": _first(mine, SAMPLER),
        "user_metadata": texts(row.user_metadata),
    }


def _first(found: Iterable[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((one for one in found if one["checkpoint_type"] == TYPES[kind]), None)


def weights_info(path: str) -> dict[str, Any]:
    """What a checkpoint was saved from. Raises SignalError not_found."""
    manifest = checkpoints.find(path, "tinker_path").saved().manifest
    config = manifest["config"]
    return {
        "base_model": manifest["base_model"],
        "is_lora": True,
        "lora_rank": config["lora_r"],
        "optimizer_config": {"type": "adamw"},
        **{name: config.get(name) for name in ("train_unembed", "train_mlp", "train_attn")},
    }


def session_body(session_id: str) -> dict[str, Any]:
    """One session. Raises SignalError not_found."""
    db = services().db
    row = sessions.own(db, user().id, session_id)
    mine = sessions.models_of(db, session_id)
    return {
        "training_run_ids": [model.model_id for model in mine if model.number is not None],
        "sampler_ids": sessions.samplers_of(db, session_id),
        "user_metadata": texts(row.about.get("user_metadata")),
        "display_name": row.about.get("display_name"),
    }


def summary(row: SessionRow) -> dict[str, Any]:
    """One session in a search."""
    db = services().db
    ids = [model.model_id for model in sessions.models_of(db, row.session_id)]
    mine = [one for model_id in ids for one in checkpoints_of(model_id)]
    return {
        "session_id": row.session_id,
        "created_at": rfc3339(row.created_at),
        "owner": user().name,
        "project_id": row.about.get("project_id") or "default",
        "status": status_of(row),
        "checkpoints_count": len(mine),
        "checkpoint_storage_bytes": sum(one["size_bytes"] for one in mine),
        "display_name": row.about.get("display_name"),
        "user_metadata": texts(row.about.get("user_metadata")),
    }


def status_of(row: SessionRow) -> dict[str, Any] | None:
    """How a session stands; None when its client has vanished."""
    if row.finished_at is not None:
        finish = row.finish or {}
        return {
            "type": "client_finished",
            "reason": {"type": finish.get("reason", "success")},
            "detail": finish.get("detail"),
        }
    return None if row.parked else {"type": "active"}


def models_page(offset: int, limit: int) -> dict[str, Any]:
    """A page of the caller's models."""
    rows, total = models.page(services().db, user().id, offset, limit)
    found = [training_run(row) for row in rows]
    return {"training_runs": found, "cursor": cursor(offset, limit, total)}
