"""Sampling one request to its end, from a base or a run's weights; see `generation` for many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.engine.base import Base
from workers.engine.generation.generator import Generator
from workers.engine.generation.request import OnToken, PromptScores, Request, SampleOutput
from workers.engine.parameters import Weights
from workers.engine.random import SampleKey
from workers.engine.stopping import Sample, TextDecoder

__all__ = [
    "PromptScores",
    "Sample",
    "SampleKey",
    "SampleOutput",
    "SampleParams",
    "TextDecoder",
    "sample",
]

# Keys and values of the rows that are continued together.
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class SampleParams:
    """How to sample: fields of `generation.Request`."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    min_p: float = 0.0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0

    def request(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: TextDecoder,
        key: SampleKey,
        weights: Weights | None,
        *,
        deterministic: bool = False,
        on_token: OnToken | None = None,
    ) -> Request:
        """The request that samples `prompts` so."""
        return Request(
            prompts,
            tokenizer,
            key,
            **vars(self),
            weights=weights,
            deterministic=deterministic,
            on_token=on_token,
        )


def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    params: SampleParams,
    tokenizer: TextDecoder,
    should_stop: Callable[[], bool],
    key: SampleKey,
    weights: Weights | None = None,
) -> SampleOutput:
    """Continue each of `prompts` (token ids) `params.n` times with `weights`, None: the bare base.

    `should_stop` is asked before each token. A row that reaches the model's context ends with "length".
    Raises SignalError validation_error (an empty prompt), sequence_too_long, token_out_of_range, non_finite,
    out_of_memory.
    """
    generator = Generator(base, cache_bytes=_CACHE_BYTES)
    ticket = generator.submit(params.request(prompts, tokenizer, key, weights))
    while not ticket.done:
        if should_stop():
            generator.cancel(ticket)
        else:
            generator.step()
    if ticket.error is not None:
        raise ticket.error
    assert ticket.output is not None
    return ticket.output
