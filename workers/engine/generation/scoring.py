"""Log-probabilities of prompts, as a training forward pass gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.choose import Likeliest
from workers.engine.decoder import Pass
from workers.engine.generation.request import PromptScores, Request
from workers.engine.logprob import TokenStats, token_stats
from workers.engine.memory import is_out_of_memory


def score(base: Base, request: Request) -> list[PromptScores]:
    """The scores of each prompt. A deterministic request's prompts are computed one by one.

    Raises SignalError non_finite and out_of_memory with the prompt's name.
    """
    most = 1 if request.deterministic else base.new_budget().tokens(False)
    found: list[PromptScores] = [PromptScores([None])] * len(request.prompts)
    with base.activated(request.weights):
        for numbers in _batches(request.prompts, most):
            found = _through(base, request, numbers, found)
    return found


def _batches(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """The numbers of prompts that go through the model together, shorter ones first."""
    batches: list[list[int]] = []
    tokens = 0
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        tokens += len(prompts[number])
        if not batches or tokens > most:
            batches.append([])
            tokens = len(prompts[number])
        batches[-1].append(number)
    return batches


def _through(
    base: Base, request: Request, numbers: Sequence[int], found: list[PromptScores]
) -> list[PromptScores]:
    """`found` with the scores of some prompts; out of memory, halves of them."""
    try:
        made = _scores(base, request, numbers)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        made = None
    if made is not None:
        made_by = dict(zip(numbers, made, strict=True))
        return [made_by.get(number, old) for number, old in enumerate(found)]
    if len(numbers) == 1:
        raise SignalError("out_of_memory", param=f"prompts.{numbers[0]}")
    half = len(numbers) // 2
    for part in (numbers[:half], numbers[half:]):
        found = _through(base, request, part, found)
    return found


def _scores(base: Base, request: Request, numbers: Sequence[int]) -> list[PromptScores]:
    prompts = [request.prompts[number] for number in numbers]
    lengths = tuple(len(prompt) - 1 for prompt in prompts if len(prompt) > 1)
    top = request.prompt_top_logprobs
    if not lengths:
        return [PromptScores([None], [None] if top else None) for _ in prompts]
    tokens, targets = (
        torch.tensor([token for prompt in prompts for token in prompt[part]], device=base.device)
        for part in (slice(None, -1), slice(1, None))
    )
    hidden = base.decoder.hidden(tokens, Pass(lengths))
    stats = token_stats(hidden, targets, base.decoder.head, top=top)
    return _cut(numbers, prompts, stats)


def _cut(
    numbers: Sequence[int], prompts: Sequence[Sequence[int]], stats: TokenStats
) -> list[PromptScores]:
    logprobs, finite = stats.logprobs.tolist(), stats.logprobs.isfinite().tolist()
    tops: list[Likeliest] | None = None
    if stats.top_ids is not None and stats.top_logprobs is not None:
        tops = list(zip(stats.top_ids.tolist(), stats.top_logprobs.tolist(), strict=True))
    scores, at = [], 0
    for number, prompt in zip(numbers, prompts, strict=True):
        end = at + len(prompt) - 1
        if not all(finite[at:end]):
            raise SignalError(
                "non_finite", "The prompt's scores are not finite.", param=f"prompts.{number}"
            )
        top = None if tops is None else [None, *tops[at:end]]
        scores.append(PromptScores([None, *logprobs[at:end]], top))
        at = end
    return scores
