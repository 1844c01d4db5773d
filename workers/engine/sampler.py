"""Sampling from a base and whatever adapter is active: one prefill per prompt, then token by token.

Rows are continued together with a key-value cache, prompts of mixed length too, and the copies of a
prompt share its prefill. Randomness is a function of (key, row, token) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.choose import choose
from workers.engine.decoder import Cache
from workers.engine.random import SampleKey, uniform
from workers.engine.stopping import Continuation, Sample, StopRule, TextDecoder

__all__ = ["Sample", "SampleKey", "SampleOutput", "SampleParams", "TextDecoder", "sample"]

# Keys and values of the rows that are continued together.
_CACHE_BYTES = 1 << 30
# Rows that have ended are taken out of the batch when at most this part of it is left.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class SampleParams:
    """How to sample; top_k 0 or less and top_p 1 mean no truncation, temperature 0 means greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1


@dataclass(frozen=True)
class SampleOutput:
    """`samples[prompt][copy]`; `cancelled`: should_stop ended it early, with rows unfinished."""

    samples: list[list[Sample]]
    num_tokens: int
    cancelled: bool


def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    params: SampleParams,
    tokenizer: TextDecoder,
    should_stop: Callable[[], bool],
    key: SampleKey,
) -> SampleOutput:
    """Continue each of `prompts` (token ids) `params.n` times.

    `should_stop` is asked before each token. A row that reaches the model's context ends with "length".
    Raises SignalError validation_error (an empty prompt), sequence_too_long, token_out_of_range, non_finite.
    """
    _check(base, prompts)
    rule = StopRule(frozenset(params.stop_token_ids), params.stop_strings)
    limits = [min(params.max_tokens, base.context_length - len(prompt)) for prompt in prompts]
    rows = [Continuation(rule, tokenizer, limit) for limit in limits for _ in range(params.n)]
    cancelled = False
    # Not inference_mode: tables that a model keeps (rotary ones) must stay usable in training.
    with torch.no_grad():
        for wave in _waves(base, prompts, limits, params.n):
            cancelled = not _continue(base, prompts, rows, wave, params, should_stop, key)
            if cancelled:
                break
    samples = [
        [row.sample for row in rows[at : at + params.n]] for at in range(0, len(rows), params.n)
    ]
    return SampleOutput(samples, sum(len(row.sample.token_ids) for row in rows), cancelled)


def _check(base: Base, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts:
        raise SignalError("validation_error", "There is no prompt.", param="prompts")
    for number, prompt in enumerate(prompts):
        param = f"prompts.{number}"
        if not prompt:
            raise SignalError("validation_error", "The prompt has no tokens.", param=param)
        if len(prompt) >= base.context_length:
            raise SignalError(
                "sequence_too_long",
                f"The prompt has {len(prompt)} tokens; the model's context is {base.context_length}.",
                param=param,
            )
        if min(prompt) < 0 or max(prompt) >= base.vocab_size:
            raise SignalError(
                "token_out_of_range", f"Token ids are 0 to {base.vocab_size - 1}.", param=param
            )


def _waves(
    base: Base, prompts: Sequence[Sequence[int]], limits: Sequence[int], n: int
) -> Iterator[range]:
    """Row numbers, in order, that fit the cache together."""
    begin, longest, room = 0, 0, _CACHE_BYTES // base.decoder.cache_bytes_per_token
    for row in range(len(prompts) * n):
        need = max(longest, len(prompts[row // n]) + limits[row // n])
        if row > begin and need * (row - begin + 1) > room:
            yield range(begin, row)
            begin, need = row, len(prompts[row // n]) + limits[row // n]
        longest = need
    yield range(begin, len(prompts) * n)


def _continue(
    base: Base,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Continuation],
    wave: range,
    params: SampleParams,
    should_stop: Callable[[], bool],
    key: SampleKey,
) -> bool:
    """Sample the rows of `wave` to their ends; False when should_stop said so first."""
    if should_stop():
        return False
    numbers = np.array(wave, np.int64)
    hidden, cache = _prefill(base, prompts, wave, params)
    for place in range(params.max_tokens):
        uniforms = torch.from_numpy(uniform(key, numbers, place)).to(base.device)
        ids, logprobs = choose(
            base.decoder.head.logits(hidden),
            uniforms,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
        )
        _append([rows[number] for number in numbers], ids, logprobs)
        alive = [at for at, number in enumerate(numbers) if not rows[number].finished]
        if not alive:
            break
        if should_stop():
            return False
        if len(alive) <= _COMPACT_BELOW * len(numbers):
            kept = torch.tensor(alive, device=base.device)
            numbers, ids, cache = numbers[alive], ids[kept], cache.select(kept)
        hidden = base.decoder.decode(ids, cache)
    return True


def _prefill(
    base: Base, prompts: Sequence[Sequence[int]], wave: range, params: SampleParams
) -> tuple[Tensor, Cache]:
    first, last = wave.start // params.n, (wave.stop - 1) // params.n
    chosen = prompts[first : last + 1]
    shortest = min(len(prompt) for prompt in chosen)
    room = min(params.max_tokens, base.context_length - shortest)
    hidden, cache = base.decoder.prefill(chosen, room)
    if len(wave) == len(chosen):
        return hidden, cache
    copies = torch.tensor([row // params.n - first for row in wave], device=base.device)
    return hidden[copies], cache.select(copies)


def _append(rows: Sequence[Continuation], ids: Tensor, logprobs: Tensor) -> None:
    for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
        if row.finished:
            continue
        if not math.isfinite(logprob):
            raise SignalError(
                "non_finite", "The model's logits are not finite; nothing was changed."
            )
        row.add(token, logprob)
