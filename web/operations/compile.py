"""From a validated request to the bytes that a worker gets. Pure but for the tokenizer; no Flask.

Everything that can be known without the worker is refused here, with every wrong row named at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack

from schemas.errors import Detail, SignalError, raise_all
from schemas.losses import find_loss
from schemas.sampling import LIVE, SAVED
from web.history.saved import Saved, check_fits
from web.runs.facts import RunFacts
from workers.catalogue import ModelEntry
from workers.queue.records import NewEntry
from workers.text.batches import MAX_GROUP, compile_batch, compile_forward
from workers.text.prompts import render_prompts
from workers.text.rows import Row, pack_rows
from workers.text.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
MAX_ANSWER_NUMBERS = 4_000_000


def _no_saved(run_id: str, name: str, path: str) -> Saved:
    raise SignalError("not_found", param=f"{path}artifact")


@dataclass(frozen=True)
class Target:
    """What a request is compiled for: the run, its model, and the largest group of responses.

    `saved(run_id, artifact, path)` finds a state that the run's owner has saved, or raises SignalError
    not_found that names the field below `path`.
    """

    facts: RunFacts
    model: ModelEntry
    saved: Callable[[str, str, str], Saved] = _no_saved
    max_group: int = MAX_GROUP

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded once per process."""
        return load_tokenizer(self.model.path)


@dataclass(frozen=True)
class Compiled:
    """A body, its size in tokens, and what the journal must know of it."""

    body: bytes
    tokens: int = 0
    on_error: str = "fail"
    ordered: bool = True


def compile_operation(
    kind: str, request: Mapping[str, Any], target: Target, path: str = ""
) -> NewEntry:
    """An entry for the journal. `path` goes before the names of wrong fields."""
    compiled = _COMPILERS[kind](request, target, path)
    lane, client_seq = request.get("lane"), request.get("client_seq")
    return NewEntry(
        kind=kind,
        body=compiled.body,
        tokens=compiled.tokens,
        lane=lane,
        client_seq=client_seq,
        on_error=compiled.on_error,
        digest=digest(kind, compiled, lane, client_seq),
        ordered=compiled.ordered,
    )


def digest(kind: str, compiled: Compiled, lane: str | None, client_seq: int | None) -> str:
    """The identity of a request: of what it means, so defaults may be spelled out in a repeat."""
    place = f"{kind}|{lane or ''}|{client_seq or ''}|{compiled.on_error}|".encode()
    return hashlib.sha256(place + compiled.body).hexdigest()


def _forward_backward(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    loss, options = find_loss(request["loss_fn"], f"{path}loss_fn"), request["loss_kwargs"]
    wrong = loss.problems(options, f"{path}loss_kwargs")
    given = {} if wrong else options
    rows = _rows(request, target, path, wrong, loss=loss, options=given)
    body = {
        "loss_fn": loss.name,
        # With the defaults filled in, so that a later default changes no journal.
        "loss_kwargs": loss.resolved(options),
        "accumulate": request["accumulate"],
        "rows": pack_rows(rows),
    }
    if request["logprobs"]:
        body["logprobs"] = True
        check_answer(sum(len(row.targets) for row in rows), f"{path}logprobs")
    return Compiled(_pack(body), sum(map(len, rows)))


def _rows(
    request: Mapping[str, Any],
    target: Target,
    path: str,
    wrong: Sequence[Detail] = (),
    **options: Any,
) -> list[Row]:
    """The rows of `batch_data`; what is wrong with them is raised together with `wrong`."""
    try:
        rows = compile_batch(
            request["batch_data"],
            target.tokenizer,
            max_length=target.facts.config["max_seq_length"],
            vocab_size=target.model.vocab_size,
            param=f"{path}batch_data",
            options_param=f"{path}loss_kwargs",
            max_group=target.max_group,
            **options,
        )
    except SignalError as error:
        raise_all((*wrong, *(error.details or [Detail(error.param, error.code, error.message)])))
        raise
    raise_all(wrong)
    return rows


def _forward(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    rows = compile_forward(
        request["batch_data"],
        target.tokenizer,
        max_length=target.facts.config["max_seq_length"],
        vocab_size=target.model.vocab_size,
        prompt_logprobs=request["prompt_logprobs"],
        param=f"{path}batch_data",
    )
    numbers = sum(len(row.targets) + 2 * request["top_k"] * len(row) for row in rows)
    check_answer(numbers, f"{path}top_k")
    body = {"top_k": request["top_k"], "rows": pack_rows(rows)}
    return Compiled(_pack(body), sum(map(len, rows)))


def check_answer(numbers: int, param: str) -> None:
    """Raises SignalError validation_error for an answer of too many numbers, which `param` asks for."""
    if numbers > MAX_ANSWER_NUMBERS:
        raise SignalError(
            "validation_error",
            f"The answer would hold {numbers:,} numbers and may hold {MAX_ANSWER_NUMBERS:,}: ask for fewer "
            "or send fewer rows.",
            param=param,
        )


def _optim_step(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    body = {name: value for name, value in request.items() if name not in ("lane", "client_seq")}
    return Compiled(_pack(body), on_error=request["on_error"])


def _sample(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    return compile_sample(request, target, _weights(request["weights"], target, path), path)


def compile_sample(
    request: Mapping[str, Any], target: Target, weights: Mapping[str, Any], path: str = ""
) -> Compiled:
    """A sample from `weights`, as the worker is told them. Raises SignalError with the fields' names."""
    prompts = render_prompts(
        request["prompts"],
        target.tokenizer,
        # Where tokens are to be sampled, at least one.
        max_length=target.model.context_length - (request["max_tokens"] > 0),
        vocab_size=target.model.vocab_size,
        param=f"{path}prompts",
    )
    texts, ids = _stop(request["stop"], target.tokenizer)
    body = {
        "prompts": prompts,
        "max_tokens": request["max_tokens"],
        "temperature": request["temperature"],
        "top_p": request["top_p"],
        "top_k": max(0, request["top_k"]),
        "stop_strings": texts,
        "stop_token_ids": ids,
        "seed": request["seed"],
        "n": request["n"],
        "logprobs": request["logprobs"],
        "min_p": request["min_p"],
        "first_row": request["first_row"],
        "top_logprobs": request["top_logprobs"],
        "prompt_logprobs": request["prompt_logprobs"],
        "top_prompt_logprobs": request["top_prompt_logprobs"],
        "deterministic": request["deterministic"],
        "weights": weights,
    }
    if request.get("stream"):
        body["stream"] = True
    _check_numbers(body, path)
    return Compiled(_pack(body), sum(map(len, prompts)), ordered=weights["source"] == LIVE)


def _weights(wanted: Any, target: Target, path: str) -> dict[str, Any]:
    """What the worker samples from. Raises SignalError not_supported, not_found or state_mismatch."""
    if wanted != LIVE and not target.facts.config["lora_r"]:
        raise SignalError(
            "not_supported",
            "A run that trains all parameters has no weights but the live ones.",
            param=f"{path}weights",
        )
    if isinstance(wanted, str):
        return {"source": wanted, "run_id": None, "artifact": None}
    run_id = wanted.get("run_id") or target.facts.run_id
    saved = target.saved(run_id, wanted["artifact"], f"{path}weights.")
    model = saved.manifest["base_model"]
    if model != target.model.name:
        text = f"It was saved from {model!r}, not {target.model.name!r}."
        raise SignalError("state_mismatch", text, param=f"{path}weights.artifact")
    own = {"run_id": run_id, "artifact": saved.name, "key": saved.key, "sha256": saved.sha256}
    return {"source": SAVED, **own}


def _check_numbers(body: Mapping[str, Any], path: str) -> None:
    """An answer has its bounds like a request."""
    sampled = len(body["prompts"]) * body["n"] * body["max_tokens"] * body["top_logprobs"]
    prompts = sum(map(len, body["prompts"])) * body["top_prompt_logprobs"]
    for name, numbers in (("top_logprobs", sampled), ("top_prompt_logprobs", prompts)):
        if 2 * numbers > MAX_ANSWER_NUMBERS:
            raise SignalError(
                "validation_error",
                f"The answer would hold up to {2 * numbers:,} numbers and may hold {MAX_ANSWER_NUMBERS:,}.",
                param=f"{path}{name}",
            )


def _stop(stop: Any, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    if stop is None:
        return [], list(tokenizer.eos_token_ids)
    items = [stop] if isinstance(stop, str) else list(stop)
    texts = [item for item in items if isinstance(item, str)]
    return texts, [item for item in items if not isinstance(item, str)]


def _save_state(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    return Compiled(_pack({"name": request["name"], "mode": request["mode"]}))


def _load_state(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    source = request["run_id"] or target.facts.run_id
    found = target.saved(source, request["artifact"], path)
    config, optimizer = target.facts.config, request["optimizer"]
    try:
        check_fits(found, config, target.model, optimizer=optimizer, path=path)
    except SignalError as error:
        # Fields of the run's configuration are no fields of this request.
        param = f"{path}optimizer" if error.param == f"{path}optimizer" else f"{path}artifact"
        raise SignalError(error.code, error.message, param=param) from None
    body = {"key": found.key, "sha256": found.sha256, "optimizer": optimizer}
    return Compiled(_pack(body))


def _certificate(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    return Compiled(_pack({}))


def _complete(request: Mapping[str, Any], target: Target, path: str) -> Compiled:
    return Compiled(_pack({"save": request["save"], "name": request["name"]}))


_Compiler = Callable[[Mapping[str, Any], Target, str], Compiled]
_COMPILERS: dict[str, _Compiler] = {
    "forward_backward": _forward_backward,
    "forward": _forward,
    "optim_step": _optim_step,
    "sample": _sample,
    "save_state": _save_state,
    "load_state": _load_state,
    "certificate": _certificate,
    "complete": _complete,
}


def gather(make: Callable[[int], T], count: int) -> list[T]:
    """`make` of every index; what is wrong with any of them is raised together."""
    made: list[T] = []
    wrong: list[Detail] = []
    for index in range(count):
        try:
            made.append(make(index))
        except SignalError as error:
            wrong.extend(error.details or [Detail(error.param, error.code, error.message)])
    raise_all(wrong)
    return made


def _pack(body: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(body))
