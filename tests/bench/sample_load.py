"""Requests that arrive over time, served by the engine's continuous batch and by generate in batches.

The clock is moved by CPU seconds of work, and by waiting where there is nothing to do: what others do on the
machine does not show.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.bench.sample_peers import Generate
from workers.engine.base import Base
from workers.engine.generation import Generator, Request, Ticket
from workers.text.tokenizer import Tokenizer

_BATCH = 16


@dataclass(frozen=True)
class Arrival:
    """A request of one prompt for `tokens` tokens at `at` seconds."""

    at: float
    prompt: list[int]
    tokens: int


def arrivals(count: int, apart: float) -> list[Arrival]:
    """`count` requests for 8 to 128 tokens, one every `apart` seconds."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        drawn: list[int] = torch.randint(low, high, (size,), generator=generator).tolist()
        return drawn

    return [
        Arrival(number * apart, draw(4, 49000, draw(16, 65)[0]), draw(8, 129)[0])
        for number in range(count)
    ]


def engine_load(base: Base, tokenizer: Tokenizer, load: Sequence[Arrival]) -> dict[str, float]:
    """Each request joins with the step after its arrival."""
    generator, clock = Generator(base, cache_bytes=1 << 30), 0.0
    left, latencies = list(load), []
    begun: dict[int, Arrival] = {}
    while left or begun:
        if not begun:
            clock = max(clock, left[0].at)
        while left and left[0].at <= clock:
            one = left.pop(0)
            request = Request([one.prompt], tokenizer, (len(left), 0), one.tokens)
            begun[id(generator.submit(request))] = one
        ended, seconds = _timed(generator)
        clock += seconds
        latencies += [clock - begun.pop(id(ticket)).at for ticket in ended]
    return _summary(load, clock, latencies)


def _timed(generator: Generator) -> tuple[list[Ticket], float]:
    begun = time.process_time()
    return generator.step(), time.process_time() - begun


def generate_load(peer: Generate, load: Sequence[Arrival]) -> dict[str, float]:
    """Up to 16 of those that have arrived are one batch, as long as the longest of them."""
    clock, left, latencies = 0.0, list(load), []
    while left:
        # A fuller batch is worth the wait.
        clock = max(clock, left[min(_BATCH, len(left)) - 1].at)
        taken, left = left[:_BATCH], left[_BATCH:]
        begun = time.process_time()
        peer.batch([one.prompt for one in taken], max(one.tokens for one in taken))
        clock += time.process_time() - begun
        latencies += [clock - one.at for one in taken]
    return _summary(load, clock, latencies)


def _summary(load: Sequence[Arrival], clock: float, latencies: Sequence[float]) -> dict[str, float]:
    return {
        "done_s": round(clock, 2),
        "tokens_per_s": round(sum(one.tokens for one in load) / clock, 1),
        "mean_latency_s": round(sum(latencies) / len(latencies), 2),
    }
