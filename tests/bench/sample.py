"""Sampling against transformers on SmolLM2-135M in bfloat16: `make bench-sample`.

CPU seconds of one thread in one process, variants in turn so that a busy machine slows all of them; medians.
Batches: 16 prompts, 64 tokens each; 16 samples of one long prompt; 16 requests of several adapters; 64
requests of 8 to 128 tokens that arrive over time, by a clock that only work and waiting move; and one
iteration of reinforcement learning. Prints a table to stderr and JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.sample_load import Arrival, arrivals, engine_load, generate_load
from tests.bench.sample_peers import Generate
from tests.bench.sample_rl import iteration, peer_iteration
from tests.bench.timing import say
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.generation import Generator, Request
from workers.engine.lora import LoraSpec
from workers.engine.sampler import SampleParams, sample
from workers.engine.trainer import Trainer
from workers.text.tokenizer import Tokenizer, load_tokenizer

MODEL = Path(__file__).parents[2] / ".signal" / "models" / "smollm2-135m-instruct"
TOKENS = 64
Variants = dict[str, Callable[[], Any]]


def main() -> int:
    """Runs it all; 0 when every aim is met."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, default=MODEL)
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = load_base(args.model, dtype="bfloat16"), load_tokenizer(args.model)
    peer = Generate(args.model)
    found: dict[str, Any] = {"torch": torch.__version__}
    found["batch_s"] = medians(batch(base, tokenizer, peer), args.repeats)
    found["shared_s"] = medians(shared(base, tokenizer, peer), args.repeats)
    found["adapters_s"] = medians(adapters(base, tokenizer), args.repeats)
    found["arriving"] = arriving(base, tokenizer, peer)
    found["rl_iteration"] = {
        "engine": iteration(args.model, tokenizer),
        "transformers + peft": peer_iteration(peer),
    }
    found["aims"] = aims(found)
    print(table(found), file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 0 if all(aim["met"] for aim in found["aims"]) else 1


def batch(base: Base, tokenizer: Tokenizer, peer: Generate) -> Variants:
    """16 prompts, 64 tokens each."""
    prompts = random_prompts([24, 28, 30, 32] * 4)
    return {
        "generate, dynamic cache": partial(peer.batch, prompts, TOKENS),
        "generate, static cache": partial(peer.batch, prompts, TOKENS, static=True),
        "generate_batch": partial(peer.continuous, prompts, TOKENS),
        "engine": lambda: sampled(base, tokenizer, prompts, 1),
    }


def shared(base: Base, tokenizer: Tokenizer, peer: Generate) -> Variants:
    """16 samples of one prompt of 256 tokens, 64 tokens each."""
    prompts = random_prompts([256])
    return {
        "generate, dynamic cache": partial(peer.batch, prompts, TOKENS, n=16),
        "generate, static cache": partial(peer.batch, prompts, TOKENS, static=True, n=16),
        "engine": lambda: sampled(base, tokenizer, prompts, 16),
    }


def adapters(base: Base, tokenizer: Tokenizer) -> Variants:
    """16 requests of one prompt each, 64 tokens, by so many adapters of rank 8."""
    prompts = random_prompts([24, 28, 30, 32] * 4)
    runs = [
        Trainer(base, LoraSpec(r=8, alpha=16.0, seed=seed), AdamWSettings()) for seed in range(8)
    ]
    frozen = [run.adapter.frozen() for run in runs]

    def run(count: int) -> None:
        generator = Generator(base, cache_bytes=1 << 30)
        for number, prompt in enumerate(prompts):
            weights = frozen[number % count] if count else None
            generator.submit(Request([prompt], tokenizer, (number, 0), TOKENS, weights=weights))
        while generator.active or generator.waiting:
            generator.step()

    return {f"engine, {count} adapters": partial(run, count) for count in (0, 1, 8)}


def arriving(base: Base, tokenizer: Tokenizer, peer: Generate) -> dict[str, dict[str, float]]:
    """64 requests, twenty in a second."""
    load: Sequence[Arrival] = arrivals(64, 0.05)
    say("  64 requests that arrive over time")
    return {
        "generate, batches of 16": generate_load(peer, load),
        "engine": engine_load(base, tokenizer, load),
    }


def sampled(base: Base, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], n: int) -> None:
    """The same by the engine."""
    params = SampleParams(max_tokens=TOKENS, n=n)
    out = sample(base, prompts, params, tokenizer, lambda: False, (0, 0))
    assert out.num_tokens == TOKENS * n * len(prompts)


def random_prompts(lengths: Sequence[int], vocab: int = 49000) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, vocab, (length,), generator=generator).tolist() for length in lengths]


def medians(variants: Variants, repeats: int) -> dict[str, float]:
    """Median CPU seconds by variant, after a first run that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            say(f"  {name}, {repeat}")
            begun = time.process_time()
            run()
            if repeat:
                taken[name].append(time.process_time() - begun)
    return {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}


def aims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether it was."""
    first, load = found["batch_s"], found["arriving"]
    rows = (
        (
            "16 x 64: times generate with a static cache",
            1.4,
            first["generate, static cache"] / first["engine"],
        ),
        (
            "arriving: times generate in batches of 16",
            3.0,
            load["generate, batches of 16"]["done_s"] / load["engine"]["done_s"],
        ),
    )
    return [
        {"aim": name, "at_least": least, "found": round(value, 2), "met": value >= least}
        for name, least, value in rows
    ]


def table(found: dict[str, Any]) -> str:
    """The same for eyes."""
    lines = [f"{'batch':12} {'variant':26} {'CPU s':>8} {'tokens/s':>9}"]
    for name in ("batch_s", "shared_s", "adapters_s"):
        for variant, seconds in found[name].items():
            rate = 16 * TOKENS / seconds
            lines.append(f"{name[:-2]:12} {variant:26} {seconds:8.2f} {rate:9.0f}")
    lines.append("")
    for name in ("arriving", "rl_iteration"):
        for variant, numbers in found[name].items():
            told = ", ".join(f"{key} {value}" for key, value in numbers.items())
            lines.append(f"{name}: {variant}: {told}")
    lines.append("")
    for aim in found["aims"]:
        mark = "met" if aim["met"] else "MISSED"
        lines.append(f"{aim['aim']}: {aim['found']} (aim {aim['at_least']}) {mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
