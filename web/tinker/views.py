"""/api/v1 for the SDK's clients: the server, sessions, models, operations, samples, futures."""

from __future__ import annotations

from flask import Blueprint, Response

from web.admission import end_work
from web.answers import json_answer
from web.context import services, user
from web.parsing import raw_body
from web.tinker import (
    completions,
    errors,
    futures,
    limits,
    models,
    requests,
    sample_requests,
    samplers,
    sampling,
    sessions,
    training,
)
from web.tinker.checkpoints import find
from web.tinker.requests import read

blp = Blueprint("tinker", __name__, url_prefix="/api/v1")
errors.install(blp)

_CREATE_MODEL, _CREATE_SESSION = requests.CreateModel(), requests.CreateSession()
_HEARTBEAT, _FINISH, _MODEL = requests.Heartbeat(), requests.Finish(), requests.ModelRequest()
_LOAD, _SAMPLER, _JOIN = (
    requests.LoadWeights(),
    sample_requests.CreateSampler(),
    sample_requests.JoinSampler(),
)
_SAMPLE, _RETRIEVE = sample_requests.Sample(), sample_requests.Retrieve()
_RETRIEVE_MANY = sample_requests.RetrieveMany()
_CONFIG = requests.ClientConfig()


@blp.post("/client/config")
def client_config() -> Response:
    """What the SDK is to keep to."""
    read(_CONFIG)
    return json_answer(limits.client_config())


@blp.post("/client/dynamic_config")
def dynamic_config() -> Response:
    """What the SDK asks for again now and then."""
    read(_CONFIG)
    return json_answer({"sample_cancel_enabled": True})


@blp.get("/healthz")
def healthz() -> Response:
    """Is the process alive?"""
    return json_answer({"status": "ok"})


@blp.get("/get_server_capabilities")
def capabilities() -> Response:
    """The models that the operator has named."""
    found = [
        {
            "model_name": entry.name,
            "max_context_length": entry.context_length,
            "trainable": True,
            "sampleable": True,
        }
        for entry in services().catalogue.entries()
    ]
    return json_answer({"supported_models": found})


@blp.post("/telemetry")
def telemetry() -> Response:
    """Nothing of it is kept."""
    return json_answer({"status": "accepted"})


@blp.post("/create_session")
def create_session() -> Response:
    """A client has come."""
    request = read(_CREATE_SESSION)
    about = {name: value for name, value in request.items() if name != "type"}
    session_id = sessions.create(services().db, user().id, about)
    return json_answer({"type": "create_session", "session_id": session_id})


@blp.post("/session_heartbeat")
def heartbeat() -> Response:
    """It is still there; 410 when its session is finished."""
    alive = sessions.beat(services().db, user().id, read(_HEARTBEAT)["session_id"])
    if not alive:
        return json_answer({"detail": "The session is finished."}, 410)
    return json_answer({"type": "session_heartbeat"})


@blp.post("/sessions/<session_id>/finish")
def finish_session(session_id: str) -> Response:
    """It goes: its runs are completed behind what is queued."""
    request = read(_FINISH)
    reason = {"reason": request["reason"]["type"], "detail": request["detail"]}
    if sessions.finish(services().db, user().id, session_id, reason):
        models.complete_all(session_id)
    return json_answer({})


@blp.post("/create_model")
def create_model() -> Response:
    """A run of its own; operations may be sent at once."""
    model_id = models.create(read(_CREATE_MODEL))
    return json_answer({"request_id": f"{futures.MADE}{model_id}", "model_id": model_id})


@blp.post("/get_info")
def get_info() -> Response:
    """What a model was made of."""
    return json_answer(models.info(read(_MODEL)["model_id"]))


@blp.post("/forward_backward")
def forward_backward() -> Response:
    """A loss, with or without its gradient."""
    return training.forward_backward(raw_body("application/x-protobuf"))


@blp.post("/optim_step")
def optim_step() -> Response:
    """A step of the optimizer."""
    return training.optim_step(requests.body())


@blp.post("/save_weights")
def save_weights() -> Response:
    """Weights and optimizer, from which training can go on."""
    return training.save_weights(requests.body())


@blp.post("/save_weights_for_sampler")
def save_weights_for_sampler() -> Response:
    """Weights to sample from."""
    return training.save_for_sampler(requests.body())


@blp.post("/save_weights_external")
def save_weights_external() -> Response:
    """Weights to be downloaded."""
    return training.save_external(requests.body())


@blp.post("/load_weights")
def load_weights() -> Response:
    """A new model that begins from a checkpoint, or one that goes on from it."""
    body = requests.body()
    if body.get("session_id") is None:
        return training.load_weights(body)
    request = requests.load(_LOAD, body)
    model_id = models.create_from(request, find(request["path"]))
    return json_answer({"request_id": f"{futures.LOADED}{model_id}", "model_id": model_id})


@blp.post("/create_sampling_session")
def create_sampling_session() -> Response:
    """A sampling session on a base model or a checkpoint."""
    return json_answer({"sampling_session_id": samplers.create(read(_SAMPLER))})


@blp.get("/samplers/<sampler_id>")
def get_sampler(sampler_id: str) -> Response:
    """What a sampling session samples from."""
    row = samplers.own(sampler_id)
    facts = {"sampler_id": row.sampler_id, "base_model": row.base_model}
    return json_answer({**facts, "model_path": row.model_path})


@blp.post("/join_sampling_session")
def join_sampling_session() -> Response:
    """A number for each copy of a client, which its requests are told apart by."""
    row = samplers.own(read(_JOIN)["sampling_session_id"])
    return json_answer({"client_counter": samplers.next_copy(row.sampler_id)})


@blp.post("/asample")
def asample() -> Response:
    """Samples of one prompt."""
    return json_answer(sampling.submit(read(_SAMPLE)))


@blp.post("/retrieve_future")
def retrieve_future() -> Response:
    """The result of a request, waited for."""
    return futures.retrieve(read(_RETRIEVE)["request_id"])


@blp.post("/retrieve_futures")
def retrieve_futures() -> Response:
    """Which of a sampling client's requests have ended, waited for together."""
    request = read(_RETRIEVE_MANY)
    # A poll has a body, and must not keep others from theirs while it waits.
    end_work()
    return json_answer(completions.wait(request))


@blp.post("/cancel_future")
def cancel_future() -> Response:
    """Nobody waits for a request any more."""
    futures.cancel(read(_RETRIEVE)["request_id"])
    return json_answer({})
