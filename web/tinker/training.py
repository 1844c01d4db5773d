"""Operations on a model: forward_backward, optim_step, save, load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgpack
from flask import Response

from schemas.errors import SignalError
from web.history.saved import check_fits
from web.operations.compile import Compiled, Target, check_answer
from web.tinker import checkpoints, encryption, models, samplers
from web.tinker.datums import ForwardBackward, datums_of, read_request
from web.tinker.lane import submit
from web.tinker.losses import Limits, options_of, rows_of, rule_of
from web.tinker.requests import (
    LoadWeights,
    OptimStep,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
    load,
)
from web.tinker.tables import EXTERNAL, LIVE, SAMPLER, TRAINING
from workers.text.rows import pack_rows

_OPTIM_STEP, _LOAD = OptimStep(), LoadWeights()
_SAVE, _SAVE_FOR_SAMPLER, _SAVE_EXTERNAL = SaveWeights(), SaveForSampler(), SaveExternal()


def forward_backward(body: bytes) -> Response:
    """Append a forward_backward or, where it is forward only, a forward with its loss."""
    request = read_request(body)
    target = models.target(request.model_id)
    if request.seq_id < 1:
        raise SignalError("validation_error", "1 or more is needed.", param="seq_id")
    kind = "forward" if request.forward_only else "forward_backward"
    return submit(target, request.seq_id, kind, lambda: _loss(request, target))


def _loss(request: ForwardBackward, target: Target) -> Compiled:
    rule_of(request.loss_fn)
    options = options_of(request.loss_fn, request.config)
    limits = Limits(target.model.vocab_size, target.facts.config["max_seq_length"])
    rows = rows_of(datums_of(request), request.loss_fn, limits)
    check_answer(sum(len(row.targets) for row in rows), "data")
    body: dict[str, Any] = {"loss_fn": request.loss_fn, "loss_kwargs": options}
    body |= {"top_k": 0} if request.forward_only else {"accumulate": True, "logprobs": True}
    return Compiled(_pack({**body, "rows": pack_rows(rows)}), sum(map(len, rows)))


def optim_step(body: Mapping[str, Any]) -> Response:
    """Append an optimizer step."""

    def compiled(target: Target) -> Compiled:
        request = load(_OPTIM_STEP, body)
        return Compiled(_pack({**request["adam_params"], "on_error": "continue"}))

    return _in_lane(body, "optim_step", compiled)


def save_weights(body: Mapping[str, Any]) -> Response:
    """Append a save of weights and optimizer, from which training can go on."""

    def compiled(target: Target) -> Compiled:
        request = load(_SAVE, body)
        name, seq = request["path"], request["seq_id"]
        if not request["overwrite"]:
            _check_free(request["model_id"], TRAINING, name, seq)
        return _save(target, request, TRAINING, name, "state")

    return _in_lane(body, "save_state", compiled)


def save_external(body: Mapping[str, Any]) -> Response:
    """Append a save of the adapter, to be downloaded."""

    def compiled(target: Target) -> Compiled:
        request = load(_SAVE_EXTERNAL, body)
        name = request["path"]
        _check_free(request["model_id"], EXTERNAL, name, request["seq_id"])
        about = encryption.noted(request[encryption.FIELD])
        return _save(target, {**request, "user_metadata": about}, EXTERNAL, name, "adapter")

    return _in_lane(body, "save_state", compiled)


def save_for_sampler(body: Mapping[str, Any]) -> Response:
    """Append a save of the adapter to sample from: under a name, or for a sampling session of its own."""

    def compiled(target: Target) -> Compiled:
        request = load(_SAVE_FOR_SAMPLER, body)
        if request["path"] is not None:
            return _save(target, request, SAMPLER, request["path"], "adapter")
        sampler_id = samplers.of_live_weights(target, request)
        return _save(target, request, LIVE, sampler_id, "adapter", sampler_id=sampler_id)

    return _in_lane(body, "save_state", compiled)


def load_weights(body: Mapping[str, Any]) -> Response:
    """Append a load into a model that there is."""

    def compiled(target: Target) -> Compiled:
        request = load(_LOAD, body)
        saved = checkpoints.find(request["path"]).saved()
        check_fits(saved, target.facts.config, target.model, optimizer=request["optimizer"])
        names = {"key": saved.key, "sha256": saved.sha256, "optimizer": request["optimizer"]}
        return Compiled(_pack(names))

    return _in_lane(body, "load_state", compiled)


def _in_lane(body: Mapping[str, Any], kind: str, compiled: Any) -> Response:
    model_id, seq_id = body.get("model_id"), body.get("seq_id")
    if not isinstance(model_id, str):
        raise SignalError("validation_error", "A model's id is needed.", param="model_id")
    if type(seq_id) is not int or not 1 <= seq_id < 2**53:
        raise SignalError("validation_error", "An integer from 1 on is needed.", param="seq_id")
    target = models.target(model_id)
    same = hashlib.sha256(f"{kind}|{json.dumps(body, sort_keys=True)}".encode()).hexdigest()
    return submit(target, seq_id, kind, lambda: compiled(target), same)


def _check_free(model_id: str, kind: str, name: str, seq: int) -> None:
    known = checkpoints.lookup(model_id, kind, name)
    if known is not None and known.row.seq != seq:
        text = f"The model has saved {name!r} before; overwrite=True replaces it."
        raise SignalError("name_taken", text, param="path")


def _save(
    target: Target, request: Mapping[str, Any], kind: str, name: str, mode: str, **facts: Any
) -> Compiled:
    artifact = checkpoints.note(
        target.facts.run_id,
        kind,
        name,
        request["seq_id"],
        ttl_seconds=request["ttl_seconds"],
        user_metadata=request.get("user_metadata"),
        **facts,
    )
    return Compiled(_pack({"name": artifact, "mode": mode}))


def _pack(body: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(body))
