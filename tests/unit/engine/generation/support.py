"""Requests, and an independent way to sample: a forward pass per token, the draw in numpy and float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.engine.base import Base
from workers.engine.generation import Generator, Request, SampleOutput, Ticket
from workers.engine.parameters import Weights
from workers.engine.random import uniform
from workers.text.tokenizer import Tokenizer, load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [40, 41], [5, 6, 7, 8, 9, 10, 11, 12]]
_TOKENIZERS: dict[Path, Tokenizer] = {}


class NoText:
    """A decoder for tests that look at tokens alone."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def tokenizer_of(folder: Path) -> Tokenizer:
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = load_tokenizer(folder)
    return _TOKENIZERS[folder]


def ask(prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any) -> Request:
    """A request for 12 tokens of each prompt."""
    return Request(prompts, **{"tokenizer": NoText(), "key": (7, 0), "max_tokens": 12, **options})


def generator_of(base: Base, positions: int = 1 << 16) -> Generator:
    """With room for so many positions."""
    return Generator(base, cache_bytes=positions * base.decoder.cache_bytes_per_token)


def finish(generator: Generator, *tickets: Ticket) -> list[SampleOutput]:
    """Step until all of them have ended, well."""
    while not all(ticket.done for ticket in tickets):
        generator.step()
    for ticket in tickets:
        assert ticket.error is None, ticket.error
    return [ticket.output for ticket in tickets if ticket.output is not None]


def alone(base: Base, request: Request) -> SampleOutput:
    """What a request gets in a generator of its own."""
    generator = generator_of(base)
    return finish(generator, generator.submit(request))[0]


def ids_of(output: SampleOutput) -> list[list[int]]:
    return [sample.token_ids for row in output.samples for sample in row]


def logprobs_of(output: SampleOutput) -> np.ndarray:
    return np.array([p for row in output.samples for sample in row for p in sample.logprobs])


def logprobs_at(base: Base, weights: Weights | None, tokens: Sequence[int]) -> np.ndarray:
    """[V] logits behind the last of `tokens` by a plain forward pass, in float64."""
    with torch.no_grad(), base.activated(weights):
        hidden = base.decoder.hidden(torch.tensor([list(tokens)], device=base.device))
        logits: np.ndarray = base.decoder.head.logits(hidden[-1:])[0].double().numpy()
    return logits


def naive(base: Base, request: Request) -> tuple[list[list[int]], np.ndarray]:
    """Token ids of each row, and all log-probabilities one after another."""
    rows, logprobs = [], []
    for number in range(len(request.prompts) * request.n):
        prompt, made = list(request.prompts[number // request.n]), list[int]()
        while len(made) < request.max_tokens:
            logits = logprobs_at(base, request.weights, prompt + made)
            share = float(uniform(request.key, np.array([number]), len(made))[0])
            scale = request.temperature or 1.0
            values = (logits - logits.max()) / scale
            values -= np.log(np.exp(values).sum())
            token = (
                int(logits.argmax()) if not request.temperature else _draw(values, share, request)
            )
            made.append(token)
            logprobs.append(values[token])
            if token in request.stop_token_ids:
                break
        rows.append(made)
    return rows, np.array(logprobs)


def _draw(values: np.ndarray, share: float, request: Request) -> int:
    order = np.argsort(-values, kind="stable")
    cut = request.top_k > 0 or request.top_p < 1
    if not cut:
        order = np.arange(len(values))
    probabilities = np.exp(values)[order]
    if request.top_k > 0:
        probabilities[request.top_k :] = 0
    if request.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        probabilities[before >= request.top_p * probabilities.sum()] = 0
    probabilities[probabilities < request.min_p * probabilities.max()] = 0
    running = np.cumsum(probabilities)
    return int(order[int((running > share * running[-1]).argmax())])
