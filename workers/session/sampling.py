"""One sample operation: from its body to the answer's fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.engine.sampler import Sample, SampleParams
from workers.engine.trainer import Trainer
from workers.text.tokenizer import Tokenizer


def run_sample(
    trainer: Trainer,
    tokenizer: Tokenizer,
    body: dict[str, Any],
    run_seed: int,
    seq: int,
    must_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The answer without seq and timings; None when it was cancelled on the way.

    Without a seed of its own a request draws from (run seed, seq), so a repeat of the whole run
    draws the same.
    """
    params = SampleParams(
        max_tokens=body["max_tokens"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        stop_strings=tuple(body["stop_strings"]),
        stop_token_ids=tuple(body["stop_token_ids"]),
        n=body["n"],
    )
    key = (run_seed, seq) if body["seed"] is None else (body["seed"], 0)
    output = trainer.sample(body["prompts"], params, tokenizer, must_stop, key)
    if output.cancelled:
        return None
    result: dict[str, Any] = {
        "weights_step": trainer.step,
        "samples": [[_wire(sample, body["logprobs"]) for sample in row] for row in output.samples],
        "prompt_token_ids": body["prompts"],
        "metrics": {"num_tokens": float(output.num_tokens)},
    }
    if body["n"] == 1:
        result |= _flat([row[0] for row in output.samples], tokenizer, body["logprobs"])
    return result


def _wire(sample: Sample, logprobs: bool) -> dict[str, Any]:
    return {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "logprobs": sample.logprobs if logprobs else None,
        "finish_reason": sample.finish_reason,
    }


def _flat(samples: list[Sample], tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
    """The fields of the original API, which knew one sample per prompt."""
    return {
        "outputs": [sample.text for sample in samples],
        "token_ids": [sample.token_ids for sample in samples],
        "tokens": [tokenizer.token_strings(sample.token_ids) for sample in samples],
        "logprobs": [sample.logprobs for sample in samples] if logprobs else None,
    }
