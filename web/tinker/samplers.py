"""Sampling sessions: samples without a place in any order, from weights that never change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

from sqlalchemy import select

from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from schemas.sampling import BASE, CURRENT, SAVED
from web.context import services, user
from web.history.saved import find_saved
from web.operations.compile import Target
from web.tinker import checkpoints, models, sessions
from web.tinker.tables import LIVE, ModelRow, SamplerRow
from workers.canonical import digest

NO_SAMPLER = "There is no such sampling session, or it is not yours."
_MOST = 4096


class Known:
    """What never changes, remembered per process: sampling sessions, and the seals of artifacts."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._lock, self._found = Lock(), OrderedDict[str, Any]()

    def get(self, name: str) -> Any:
        """What is remembered, or None."""
        return self._found.get(name)

    def put(self, name: str, value: Any) -> None:
        """Remember; the oldest falls out."""
        with self._lock:
            self._found[name] = value
            while len(self._found) > _MOST:
                self._found.popitem(last=False)


_samplers, _weights = Known(), Known()


def sampler_id_of(session_id: str, number: int) -> str:
    """The id of a session's sampling session."""
    return f"{session_id}:sample:{number}"


def create(request: Mapping[str, Any]) -> str:
    """Make a sampling session on a base model or a checkpoint; its id. Raises SignalError."""
    session_id = request["session_id"]
    sampler_id = sampler_id_of(session_id, request["sampling_session_seq_id"])
    sessions.open_session(services().db, user().id, session_id)
    asked = digest(dict(request))
    known = _row(sampler_id)
    if known is not None:
        if known.digest != asked:
            text = "The session has made another sampling session under this number."
            raise SignalError("client_seq_conflict", text, param="sampling_session_seq_id")
        return sampler_id
    if request["model_path"] is None:
        base, weights, run_id = request["base_model"], _named(BASE), ""
    else:
        base, weights, run_id = _of_checkpoint(request)
    _add(
        SamplerRow(
            sampler_id=sampler_id,
            session_id=session_id,
            run_id=run_id or _run_for(session_id, base),
            base_model=base,
            model_path=request["model_path"],
            weights=weights,
            digest=asked,
        )
    )
    return sampler_id


def of_live_weights(target: Target, request: Mapping[str, Any]) -> str:
    """The sampling session of the weights that an operation of a model saves; its id."""
    row = models.own(request["model_id"])
    number = request["sampling_session_seq_id"]
    sampler_id = sampler_id_of(row.session_id, number)
    asked = digest(dict(request))
    known = _row(sampler_id)
    if known is not None and known.digest != asked:
        text = "The session has made another sampling session under this number."
        raise SignalError("client_seq_conflict", text, param="sampling_session_seq_id")
    if known is None:
        seq = request["seq_id"]
        artifact = checkpoints.artifact_name(LIVE, sampler_id, seq)
        inflight = request["kind"] == "inflight"
        weights = _named(CURRENT) if inflight else _saved(target.facts.run_id, artifact)
        _add(
            SamplerRow(
                sampler_id=sampler_id,
                session_id=row.session_id,
                run_id=target.facts.run_id,
                base_model=target.facts.base_model,
                weights=weights,
                digest=asked,
            )
        )
    return sampler_id


def own(sampler_id: str) -> SamplerRow:
    """The caller's sampling session. Raises SignalError not_found."""
    row = _samplers.get(sampler_id) or _row(sampler_id)
    if row is not None:
        try:
            services().facts.get(row.run_id, user().id)
        except SignalError:
            row = None
    if row is None:
        raise SignalError("not_found", NO_SAMPLER, param="sampling_session_id")
    _samplers.put(sampler_id, row)
    return row


def weights_of(row: SamplerRow) -> dict[str, Any]:
    """What a worker is told to sample from. Raises SignalError not_found or state_mismatch."""
    wanted = row.weights
    if wanted["source"] != SAVED:
        return wanted
    name = f"{wanted['run_id']}/{wanted['artifact']}"
    found = _weights.get(name)
    if found is None:
        storage = services().storage
        saved = find_saved(storage, wanted["run_id"], wanted["artifact"], "sampling_session_id")
        found = {**wanted, "key": saved.key, "sha256": saved.sha256}
        _weights.put(name, found)
    return dict(found)


def _of_checkpoint(request: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Base model, weights, and the run that saved them where it can sample itself."""
    checkpoint = checkpoints.find(request["model_path"], "model_path")
    saved = checkpoint.saved()
    base = saved.manifest["base_model"]
    if request["base_model"] not in (None, base):
        text = f"The checkpoint was saved from {base!r}."
        raise SignalError("state_mismatch", text, param="base_model")
    weights = _saved(saved.run_id, saved.name)
    run_id = saved.run_id if checkpoint.owner == user().id and _is_open(saved.run_id) else ""
    return base, weights, run_id


def _run_for(session_id: str, base_model: str) -> str:
    """A run of the session on this base that can sample: one of its models, or one for nothing else."""
    services().catalogue.entry(base_model)
    for model in sessions.models_of(services().db, session_id):
        facts = services().facts.get(model.run_id, user().id)
        if facts.base_model == base_model and _is_open(model.run_id):
            return model.run_id
    return models.host_run(session_id, base_model)


def _is_open(run_id: str) -> bool:
    head = services().journal.head(run_id)
    return head is not None and head.closed not in CLOSED_STATUSES


def _named(source: str) -> dict[str, Any]:
    return {"source": source, "run_id": None, "artifact": None}


def _saved(run_id: str, artifact: str) -> dict[str, Any]:
    return {"source": SAVED, "run_id": run_id, "artifact": artifact}


def _add(row: SamplerRow) -> None:
    with services().db.writing() as session:
        session.add(row)


def _row(sampler_id: str) -> SamplerRow | None:
    if not sampler_id.isprintable():
        return None
    query = select(SamplerRow).where(SamplerRow.sampler_id == sampler_id)
    with services().db.reading() as session:
        return session.scalar(query)


def model_of(run_id: str) -> ModelRow | None:
    """The model whose run this is."""
    with services().db.reading() as session:
        return session.scalar(select(ModelRow).where(ModelRow.run_id == run_id))


def next_copy(sampler_id: str) -> int:
    """A number that no other copy of this sampling session's client has; 0 is the first client's."""
    name, redis = f"sig:tinker:copies:{sampler_id}", services().redis
    number = int(redis.incr(name))
    redis.expire(name, services().settings.result_ttl_s)
    return number
