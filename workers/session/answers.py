"""The answer of a sample, from what the generator gave."""

from __future__ import annotations

from typing import Any

from workers.engine.generation import PromptScores, SampleOutput
from workers.engine.stopping import Sample
from workers.session.weights import Source
from workers.text.tokenizer import Tokenizer


def sample_result(
    body: dict[str, Any], source: Source, output: SampleOutput, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The fields of `schemas.results.SampleResult` but seq and timings."""
    result: dict[str, Any] = {
        "weights": source.shown,
        "weights_step": source.step,
        "samples": [[_wire(sample, body) for sample in row] for row in output.samples],
        "prompt_token_ids": body["prompts"],
        **_scores(output.prompt_scores, body.get("top_prompt_logprobs", 0)),
        "metrics": {"num_tokens": float(output.num_tokens)},
    }
    if body["n"] == 1:
        result |= _flat([row[0] for row in output.samples], tokenizer, body["logprobs"])
    return result


def _wire(sample: Sample, body: dict[str, Any]) -> dict[str, Any]:
    top = sample.top if body.get("top_logprobs") else None
    return {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "logprobs": sample.logprobs if body["logprobs"] else None,
        "top_token_ids": None if top is None else [ids for ids, _ in top],
        "top_logprobs": None if top is None else [values for _, values in top],
        "finish_reason": sample.finish_reason,
    }


def _scores(scores: list[PromptScores] | None, top: int) -> dict[str, Any]:
    tops = None
    if scores is not None and top:
        tops = [score.top or [] for score in scores]
    return {
        "prompt_logprobs": None if scores is None else [score.logprobs for score in scores],
        "prompt_top_token_ids": _part(tops, 0),
        "prompt_top_logprobs": _part(tops, 1),
    }


def _part(tops: list[list[Any]] | None, which: int) -> list[list[Any]] | None:
    if tops is None:
        return None
    return [[None if place is None else place[which] for place in row] for row in tops]


def _flat(samples: list[Sample], tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
    """The fields of the original API, which knew one sample per prompt."""
    return {
        "outputs": [sample.text for sample in samples],
        "token_ids": [sample.token_ids for sample in samples],
        "tokens": [tokenizer.token_strings(sample.token_ids) for sample in samples],
        "logprobs": [sample.logprobs for sample in samples] if logprobs else None,
    }
