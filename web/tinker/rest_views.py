"""/api/v1 for the SDK's RestClient and its commands: training runs, checkpoints, sessions, the key."""

from __future__ import annotations

import zlib
from typing import Any

from flask import Blueprint, Response, request

from schemas.errors import SignalError
from web.accounts import keys, service
from web.accounts.auth import tinker_key
from web.answers import json_answer, rfc3339
from web.context import services, user
from web.tinker import checkpoints, copying, errors, external, models, requests, rest, sessions
from web.tinker.requests import read
from web.tinker.search import Search, matches

blp = Blueprint("tinker_rest", __name__, url_prefix="/api/v1")
errors.install(blp)

_INFO, _COPY, _TTL, _SEARCH = (
    requests.WeightsInfo(),
    requests.CopyWeights(),
    requests.Ttl(),
    Search(),
)
_RUN = "/training_runs/<model_id>"
_CHECKPOINT = f"{_RUN}/checkpoints/<kind>/<name>"
# A search looks at so many of the newest sessions.
_SEARCHED = 5_000


def page() -> tuple[int, int]:
    """Offset and limit of a list. Raises SignalError validation_error."""
    found = []
    for name, default, most in (("offset", 0, 2**53), ("limit", 20, 1000)):
        text = request.args.get(name, str(default))
        if not text.isdigit() or not (0 if name == "offset" else 1) <= int(text) <= most:
            raise SignalError("validation_error", "Not a number that it can be.", param=name)
        found.append(int(text))
    return found[0], found[1]


@blp.get("/training_runs")
def list_training_runs() -> Response:
    """The caller's models, newest first."""
    return json_answer(rest.models_page(*page()))


@blp.get(_RUN)
def get_training_run(model_id: str) -> Response:
    """One model."""
    return json_answer(rest.training_run(models.own(model_id)))


@blp.get(f"{_RUN}/checkpoints")
def list_checkpoints(model_id: str) -> Response:
    """What a model has saved."""
    models.own(model_id)
    return json_answer({"checkpoints": rest.checkpoints_of(model_id)})


@blp.get("/checkpoints")
def list_user_checkpoints() -> Response:
    """What all of the caller's models have saved."""
    offset, limit = page()
    found = rest.checkpoints_of(None)
    where = rest.cursor(offset, limit, len(found))
    return json_answer({"checkpoints": found[offset : offset + limit], "cursor": where})


@blp.delete(_CHECKPOINT)
def delete_checkpoint(model_id: str, kind: str, name: str) -> Response:
    """Delete a checkpoint and its files."""
    checkpoints.delete(checkpoints.own(model_id, kind, name))
    return json_answer({})


@blp.post(f"{_CHECKPOINT}/publish")
def publish(model_id: str, kind: str, name: str) -> Response:
    """Let every user of this server read a checkpoint."""
    checkpoints.change(checkpoints.own(model_id, kind, name), public=True)
    return json_answer({})


@blp.delete(f"{_CHECKPOINT}/publish")
def unpublish(model_id: str, kind: str, name: str) -> Response:
    """The reverse."""
    checkpoints.change(checkpoints.own(model_id, kind, name), public=False)
    return json_answer({})


@blp.put(f"{_CHECKPOINT}/ttl")
def set_ttl(model_id: str, kind: str, name: str) -> Response:
    """When a checkpoint is to go, counted from now; null: never."""
    ttl = read(_TTL)["ttl_seconds"]
    checkpoints.change(checkpoints.own(model_id, kind, name), ttl_seconds=ttl)
    return json_answer({})


@blp.get(f"{_CHECKPOINT}/external_weights_urls")
def external_weights_urls(model_id: str, kind: str, name: str) -> Response:
    """Signed addresses of a checkpoint's files."""
    return json_answer(external.urls(checkpoints.own(model_id, kind, name)))


@blp.get("/external_weights/<run_id>/<artifact>/<int:until>/<mark>/<path:path>")
def external_file(run_id: str, artifact: str, until: int, mark: str, path: str) -> Response:
    """A file, for whoever has its address."""
    return external.file(run_id, artifact, until, mark, path)


@blp.post("/weights_info")
def weights_info() -> Response:
    """What a checkpoint was saved from."""
    return json_answer(rest.weights_info(read(_INFO)["tinker_path"]))


@blp.post("/copy_weights")
def copy_weights() -> Response:
    """A copy that lives on without its source."""
    path = copying.copy(read(_COPY), request.headers.get("X-Idempotency-Key"))
    return json_answer({"tinker_path": path})


@blp.get("/sessions")
def list_sessions() -> Response:
    """The caller's sessions, newest first."""
    rows = sessions.page(services().db, user().id, *page())
    return json_answer({"sessions": [row.session_id for row in rows]})


@blp.get("/sessions/<session_id>")
def get_session(session_id: str) -> Response:
    """One session."""
    return json_answer(rest.session_body(session_id))


@blp.post("/sessions/search")
def search_sessions() -> Response:
    """The caller's sessions that are as asked."""
    asked = read(_SEARCH)
    rows = sessions.page(services().db, user().id, 0, _SEARCHED)
    found = [row for row in rows if matches(row, asked)]
    here, more = found[: asked["limit"]], len(found) > asked["limit"]
    last = here[-1] if more else None
    cursor = last and {
        "last_created_at": rfc3339(last.created_at),
        "last_session_id": last.session_id,
    }
    return json_answer({"sessions": [rest.summary(row) for row in here], "next_cursor": cursor})


@blp.put("/sessions/<session_id>/project")
def assign_project(session_id: str) -> Response:
    """Note which project a session belongs to; to this server it is a label."""
    project = requests.body().get("project_id")
    if not isinstance(project, str) or not 1 <= len(project) <= 300:
        raise SignalError("validation_error", "A project's name is needed.", param="project_id")
    sessions.own(services().db, user().id, session_id)
    sessions.set_about(services().db, session_id, project_id=project)
    return json_answer({})


@blp.get("/sessions/<session_id>/trace_export")
def trace_export(session_id: str) -> Response:
    """Not supported: the SDK raises what `error` says."""
    sessions.own(services().db, user().id, session_id)
    text = "This server exports no traces: Flower and `signal runs watch` show a run's operations."
    return json_answer({"status": "failed", "error": text})


@blp.get("/audit")
def audit() -> Response:
    """There is no audit log yet."""
    return json_answer({"entries": []})


@blp.get("/billing/usage/events")
def usage_events() -> Response:
    """There is no ledger yet."""
    return json_answer({"data": [], "sessions": {}})


@blp.get("/billing/usage/checkpoints/current")
def usage_checkpoints() -> Response:
    """There is no ledger yet."""
    return json_answer({"data": []})


@blp.get("/auth/apikey/me")
def own_key() -> Response:
    """Whose key this is, for `tinker auth login`."""
    public_id, who = _public_id(), user()
    details: dict[str, Any] = {
        "org_details": {"name": "signal"},
        "user_details": {"email": who.name},
    }
    key_id = zlib.crc32(public_id.encode())
    return json_answer({"key_id": key_id, "name": public_id, "note": "", "details": details})


@blp.delete("/auth/apikey/me")
def revoke_own_key() -> Response:
    """Revoke the key that asks, for `tinker auth logout`."""
    service.revoke_key(services().db, _public_id())
    return json_answer({})


def _public_id() -> str:
    return keys.public_id(tinker_key()) or ""
