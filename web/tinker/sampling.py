"""A sample of the SDK as an entry of the journal without a place in the order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schemas.errors import SignalError
from schemas.sampling import SampleRequest
from web.operations.answering import append, target_of
from web.operations.compile import Compiled, Target, compile_sample, digest
from web.tinker import completions, samplers
from web.tinker.datums import unsupported_chunk
from web.tinker.lane import future
from web.tinker.requests import load
from workers.queue.records import NewEntry

_NATIVE = SampleRequest()
# Behind the future's id: how many prompt tokens alone are to be scored.
LAST_N = "~"


def submit(request: Mapping[str, Any]) -> dict[str, Any]:
    """Append a sample; its future. Raises SignalError with the fields' names."""
    sampler = samplers.own(request["sampling_session_id"])
    target = target_of(sampler.run_id)
    compiled = _compiled(request, target, samplers.weights_of(sampler))
    lane, seq = sampler.sampler_id, request["seq_id"]
    entry = NewEntry(
        kind="sample",
        body=compiled.body,
        tokens=compiled.tokens,
        lane=lane,
        client_seq=seq,
        digest=digest("sample", compiled, lane, seq),
        ordered=False,
    )
    (appended,), _ = append(target.facts, [entry])
    found = future(target, appended)
    if request["prompt_logprobs_last_n"] is not None:
        found["request_id"] += f"{LAST_N}{request['prompt_logprobs_last_n']}"
    completions.note(sampler, seq, found["request_id"])
    ids = [f"{sampler.sampler_id}:{seq}:{copy}" for copy in range(request["num_samples"])]
    return {**found, "sample_sequence_ids": ids}


def _compiled(request: Mapping[str, Any], target: Target, weights: Mapping[str, Any]) -> Compiled:
    prompt, params = _prompt(request["prompt"]), request["sampling_params"]
    last_n = request["prompt_logprobs_last_n"]
    if last_n is not None and not (request["prompt_logprobs"] and last_n < len(prompt)):
        text = "It needs prompt_logprobs, and fewer tokens than the prompt has."
        raise SignalError("validation_error", text, param="prompt_logprobs_last_n")
    native = {
        "prompts": [prompt],
        # All that the context has room for, where nothing is said.
        "max_tokens": params["max_tokens"] or max(1, target.model.context_length - len(prompt)),
        "n": request["num_samples"],
        "logprobs": True,
        "prompt_logprobs": bool(request["prompt_logprobs"] or request["topk_prompt_logprobs"]),
        "top_prompt_logprobs": request["topk_prompt_logprobs"],
        "top_logprobs": request["topk_sample_logprobs"],
        **{name: params[name] for name in ("temperature", "top_p", "top_k", "seed")},
        "stop": list(params["stop"]) if isinstance(params["stop"], tuple) else params["stop"],
    }
    return compile_sample(load(_NATIVE, native), target, weights)


def _prompt(prompt: Any) -> list[int]:
    """The tokens of all chunks. Raises SignalError with the chunk's name."""
    chunks = prompt.get("chunks") if isinstance(prompt, dict) else None
    if not isinstance(chunks, list):
        raise SignalError("validation_error", "An object with chunks is needed.", param="prompt")
    found: list[int] = []
    for index, chunk in enumerate(chunks):
        where = f"prompt.chunks.{index}"
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else None
        if kind != "encoded_text":
            raise unsupported_chunk(str(kind), where)
        tokens = chunk.get("tokens")
        if not isinstance(tokens, list):
            raise SignalError("validation_error", "A list of token ids is needed.", param=where)
        found += tokens
    if not found:
        raise SignalError("validation_error", "The prompt has no token.", param="prompt")
    return found
