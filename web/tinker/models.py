"""Models: each is a run, whose id follows from the model's, so that an operation looks nothing up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gpu_pool.database import Database
from schemas.errors import SignalError
from schemas.runs import RunCreate
from web.context import services, user
from web.operations.answering import target_of
from web.operations.compile import Target
from web.runs.access import runs
from web.runs.ending import complete_soon
from web.runs.facts import RunFacts
from web.runs.service import Draft
from web.tinker import sessions
from web.tinker.checkpoints import Checkpoint, fitting
from web.tinker.requests import load
from web.tinker.sweeping import end_oldest
from web.tinker.tables import ModelRow, SessionRow
from workers.canonical import digest

NO_MODEL = "There is no such model, or it is not yours."
_RUN_CREATE = RunCreate()
SESSION_LABEL, MODEL_LABEL = "tinker.session", "tinker.model"


def model_id_of(session_id: str, number: int) -> str:
    """As the SDK composes it."""
    return f"{session_id}:train:{number}"


def run_id_of(model_id: str) -> str:
    """The run behind a model."""
    return f"run_{hashlib.sha256(model_id.encode()).hexdigest()[:16]}"


def target(model_id: str) -> Target:
    """The caller's model, for operations on it. Raises SignalError not_found."""
    try:
        return target_of(run_id_of(model_id))
    except SignalError as error:
        if error.code != "not_found":
            raise
        raise SignalError("not_found", NO_MODEL, param="model_id") from None


def create(request: Mapping[str, Any]) -> str:
    """Make a model, or find the one that the same request has made; its id.

    Raises SignalError unknown_model, validation_error, run_limit, client_seq_conflict.
    """
    model_id = model_id_of(request["session_id"], request["model_seq_id"])
    model = services().catalogue.entry(request["base_model"])
    lora, seed = request["lora_config"], request["lora_config"]["seed"]
    config = _config(
        model.name,
        lora_r=lora["rank"],
        max_seq_length=model.context_length,
        seed=_seed(model_id) if seed is None else seed & (2**63 - 1),
        **{name: lora[name] for name in ("train_attn", "train_mlp", "train_unembed")},
    )
    return _make(model_id, request, model.name, config)


def create_from(request: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Make a model that begins from a checkpoint; its id. Raises as `create`, and state_mismatch."""
    model_id = model_id_of(request["session_id"], request["model_seq_id"])
    saved = checkpoint.saved()
    config = {**saved.manifest["config"]}
    base = saved.manifest["base_model"]
    if request["base_model"] not in (None, base):
        text = f"The checkpoint was saved from {base!r}."
        raise SignalError("state_mismatch", text, param="base_model")
    fitting(saved, config, optimizer=request["optimizer"])
    origin = {
        "run_id": saved.run_id,
        "seq": int(saved.manifest["seq"]),
        "artifact": saved.key,
        "optimizer": request["optimizer"],
        "name": saved.name,
        "sha256": saved.sha256,
    }
    return _make(model_id, request, base, config, origin)


def host_run(session_id: str, base_model: str) -> str:
    """The run that samples from a base for a session, made when there is none: its adapter does nothing."""
    model_id = f"{session_id}:sample-on:{hashlib.sha256(base_model.encode()).hexdigest()[:12]}"
    model = services().catalogue.entry(base_model)
    config = _config(
        model.name, lora_r=1, max_seq_length=model.context_length, seed=_seed(model_id)
    )
    request = {"session_id": session_id, "base_model": base_model}
    return run_id_of(_make(model_id, request, model.name, config))


def _config(base_model: str, **config: Any) -> dict[str, Any]:
    return runs().config(load(_RUN_CREATE, {"base_model": base_model, **config}))


def _seed(model_id: str) -> int:
    """Of a model that names none: another one for each, the same for a repeat."""
    return int.from_bytes(hashlib.sha256(b"seed" + model_id.encode()).digest()[:7], "big")


def _make(
    model_id: str,
    request: Mapping[str, Any],
    base_model: str,
    config: dict[str, Any],
    origin: dict[str, Any] | None = None,
) -> str:
    db, asked = services().db, digest(dict(request))
    sessions.open_session(db, user().id, request["session_id"])
    known = find(db, model_id)
    if known is None:
        labels = {SESSION_LABEL: request["session_id"], MODEL_LABEL: model_id}
        run_id = run_id_of(model_id)
        _create(Draft(run_id, user().id, base_model, config, model_id, labels, origin))
        with db.writing() as session:
            if _row(session, model_id) is None:
                row = ModelRow(
                    model_id=model_id,
                    session_id=request["session_id"],
                    number=request.get("model_seq_id"),
                    run_id=run_id,
                    digest=asked,
                    user_metadata=request.get("user_metadata"),
                    loaded_from=request.get("path"),
                )
                session.add(row)
    elif known.digest != asked:
        text = "The session has made another model under this number."
        raise SignalError("client_seq_conflict", text, param="model_seq_id")
    return model_id


def _create(draft: Draft) -> None:
    """Make the run; where the user has too many, the longest vanished client's make room."""
    while True:
        try:
            runs().create(draft)
        except SignalError as error:
            s = services()
            if error.code != "run_limit" or not end_oldest(s.db, s.journal, user().id):
                raise
        else:
            return


def find(db: Database, model_id: str) -> ModelRow | None:
    """The model of that id, whoever's."""
    if not model_id.isprintable():
        return None
    with db.reading() as session:
        return _row(session, model_id)


def _row(session: Session, model_id: str) -> ModelRow | None:
    return session.scalar(select(ModelRow).where(ModelRow.model_id == model_id))


def own(model_id: str) -> ModelRow:
    """The caller's model. Raises SignalError not_found."""
    target(model_id)
    row = find(services().db, model_id)
    if row is None:
        raise SignalError("not_found", NO_MODEL, param="model_id")
    return row


def page(db: Database, user_id: str, offset: int, limit: int) -> tuple[list[ModelRow], int]:
    """A user's models, newest first, and how many there are."""
    mine = (
        select(ModelRow)
        .join(SessionRow, SessionRow.session_id == ModelRow.session_id)
        .where(SessionRow.user_id == user_id, ModelRow.number.is_not(None))
    )
    with db.reading() as session:
        total = session.scalar(select(func.count()).select_from(mine.subquery())) or 0
        rows = session.scalars(mine.order_by(ModelRow.id.desc()).offset(offset).limit(limit))
        return list(rows), total


def info(model_id: str) -> dict[str, Any]:
    """What the SDK asks of a new model. Raises SignalError not_found."""
    facts = own_facts(model_id)
    name = facts.base_model
    architecture = services().catalogue.entry(name).architecture
    return {
        "type": "get_info",
        "model_id": model_id,
        "model_name": name,
        "model_data": {"arch": architecture, "model_name": name, "tokenizer_id": name},
        "is_lora": True,
        "lora_rank": facts.config["lora_r"],
        "optimizer_config": {"type": "adamw"},
    }


def own_facts(model_id: str) -> RunFacts:
    """What never changes of the caller's model. Raises SignalError not_found."""
    return target(model_id).facts


def complete_all(session_id: str) -> None:
    """Let every run of a session end behind what is queued; one that is held or over stays as it is."""
    for row in sessions.models_of(services().db, session_id):
        with suppress(SignalError):
            complete_soon(row.run_id)
