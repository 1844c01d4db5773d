"""Sampling on a GPU: its numbers against the trainer's, its speed against the memory's and transformers'.

Numbers on the small model of `gpu_numbers`, speed on a large shape in bfloat16: one row against the time that
reading the weights takes (by a copy measured in the same run), 64 rows at once against transformers'
generate, and 16 runs of rank 16 against one run. All of it by CUDA graphs, as the generator does by itself,
and one row and 64 without them besides (`eager_…`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from tests.bench.gpu_models import write_model
from tests.bench.gpu_numbers import SMALL
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.generation import Generator, Request, SampleOutput
from workers.engine.generation.replays import Capture, CudaGraphs, Replay
from workers.engine.lora import Adapter, LoraSpec
from workers.engine.parameters import Weights
from workers.engine.trainer import Trainer

How: TypeAlias = Capture | Literal["auto"] | None
CACHE_BYTES = 8 << 30
LIMITS = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
HOWS: tuple[How, How] = ("auto", None)
AIMS = {"of_the_bandwidth": 0.70, "times_generate": 5.0, "sixteen_runs": 0.9}
PROMPT = list(range(20, 84))


class _NoText:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def check_sampling(device: str = "cuda") -> list[dict[str, Any]]:
    """Distances, each with its limit and whether it holds."""
    with tempfile.TemporaryDirectory(prefix="signal-gpu-") as folder:
        path = write_model(SMALL, Path(folder), device)
        return [
            {"check": name, "found": found, "limit": limit, "holds": found <= limit}
            for name, found, limit in _checks(path, device)
        ]


def _checks(path: Path, device: str) -> Iterator[tuple[str, float, float]]:
    for dtype, limit in LIMITS.items():
        base = load_base(path, dtype=dtype, device=device)
        yield f"{dtype} sampled log-probabilities", _gap(base), limit
    base = load_base(path, dtype="float32", device=device)
    runs = [adapter(base, seed, rank) for seed, rank in ((1, 4), (2, 16), (3, 8))]
    alone = [sampled(base, [one], 1, 24, first=at)[0] for at, one in enumerate(runs)]
    together = sampled(base, runs, 1, 24)
    yield "float32 log-probabilities beside other runs", _apart(alone, together), 1e-4
    exact = sampled(base, runs[:1], 1, 24, deterministic=True)
    beside = sampled(base, runs, 1, 24, deterministic=True)[:1]
    yield "bits of a deterministic request beside others", float(_bits(exact) != _bits(beside)), 0.0
    yield from _graph_checks(path, device)


def _graph_checks(path: Path, device: str) -> Iterator[tuple[str, float, float]]:
    """Requests of several runs by CUDA graphs against the same without them. In float32: with fewer bits
    another token may be drawn; there `_gap` compares what graphs sample with the trainer."""
    base = load_base(path, dtype="float32", device=device)
    runs, graphs = [adapter(base, 1, 4), None, adapter(base, 2, 16)], graph_capture(device)
    replayed = sampled(base, runs, 2, 48, capture=graphs)
    eager = sampled(base, runs, 2, 48, capture=None)
    yield "float32 log-probabilities by graphs", _apart(replayed, eager), LIMITS["float32"]
    if graphs is not None:
        yield "CUDA graphs that could not be captured", float(not graphs.captured), 0.0


class CountedGraphs(CudaGraphs):
    """Says how many steps were captured."""

    captured = 0

    def capture(self, run: Callable[[], None]) -> Replay:
        """See Capture.capture."""
        replay = super().capture(run)
        self.captured += 1
        return replay


def graph_capture(device: str) -> CountedGraphs | None:
    """CUDA graphs that are counted; None where there are none."""
    return CountedGraphs(torch.device(device)) if device == "cuda" else None


def _gap(base: Base) -> float:
    """The greatest distance of a sampled token's log-probability from the trainer's."""
    run = Trainer(base, LoraSpec(r=8, alpha=16.0), AdamWSettings())
    shake(run.adapter, 1)
    (output,) = sampled(base, [run.adapter.frozen()], 1, 48)
    sample = output.samples[0][0]
    request = Request(
        [[*PROMPT, *sample.token_ids]], _NoText(), (0, 0), 0, prompt_logprobs=True,
        weights=run.adapter.frozen(),
    )  # fmt: skip
    (scored,) = finished(Generator(base, cache_bytes=CACHE_BYTES), [request])
    assert scored.prompt_scores is not None
    trained = scored.prompt_scores[0].logprobs[len(PROMPT) :]
    return max(abs(a - b) for a, b in zip(sample.logprobs, trained, strict=True) if b is not None)


def _apart(first: Sequence[SampleOutput], second: Sequence[SampleOutput]) -> float:
    pairs = zip(first, second, strict=True)
    return max(
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.samples[0][0].logprobs, other.samples[0][0].logprobs, strict=True)
    )


def _bits(outputs: Sequence[SampleOutput]) -> list[Any]:
    return [(one.samples[0][0].token_ids, one.samples[0][0].logprobs) for one in outputs]


def adapter(base: Base, seed: int, rank: int) -> Weights:
    """A run's weights that change what the base says."""
    made = Adapter(LoraSpec(r=rank, alpha=2.0 * rank, seed=seed), base.decoder.layers)
    shake(made, seed)
    return made.frozen()


def shake(made: Any, seed: int) -> None:
    """Away from the start, at which an adapter changes nothing."""
    noise = torch.randn(made.master.shape, generator=torch.Generator().manual_seed(seed))
    made.master += (0.02 * noise).to(made.master)
    made.renew()


def sampled(
    base: Base,
    runs: Sequence[Weights | None],
    n: int,
    tokens: int,
    *,
    deterministic: bool = False,
    first: int = 0,
    capture: How = "auto",
) -> list[SampleOutput]:
    """`n` samples of one prompt for each of `runs`, all at once, drawn by their numbers from `first` on."""
    generator = Generator(base, cache_bytes=CACHE_BYTES, capture=capture)
    requests = requests_of(runs, n, tokens, deterministic=deterministic, first=first)
    return finished(generator, requests)


def requests_of(
    runs: Sequence[Weights | None],
    n: int,
    tokens: int,
    *,
    deterministic: bool = False,
    first: int = 0,
) -> list[Request]:
    """A request of `n` samples of one prompt for each of `runs`."""
    return [
        Request(
            [PROMPT],
            _NoText(),
            (7, number),
            tokens,
            n=n,
            weights=weights,
            deterministic=deterministic,
        )
        for number, weights in enumerate(runs, first)
    ]


def finished(generator: Generator, requests: Sequence[Request]) -> list[SampleOutput]:
    """All of them at once, to their end."""
    tickets = [generator.submit(request) for request in requests]
    while not all(ticket.done for ticket in tickets):
        generator.step()
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error
    return [ticket.output for ticket in tickets if ticket.output is not None]


def decoding(
    shape: str | dict[str, Any], device: str = "cuda", tokens: int = 128, rows: int = 64
) -> dict[str, Any]:
    """Tokens per second: one row, `rows` at once, those of transformers' generate, 16 runs and one."""
    with tempfile.TemporaryDirectory(prefix="signal-gpu-") as folder:
        path = write_model(shape, Path(folder), device)
        found = _engine(path, device, tokens, rows)
        found["generate_tokens_per_s"] = _generate(path, device, tokens, rows)
    found["times_generate"] = round(found["rows_tokens_per_s"] / found["generate_tokens_per_s"], 2)
    return found


def _engine(path: Path, device: str, tokens: int, rows: int) -> dict[str, Any]:
    base = load_base(path, dtype="bfloat16", device=device)
    one, eager_one = (_speed(base, [None], 1, tokens, device, how) for how in HOWS)
    many, eager_many = (_speed(base, [None], rows, tokens, device, how) for how in HOWS)
    alone = _speed(base, [adapter(base, 1, 16)], rows, tokens, device)
    runs = [adapter(base, seed, 16) for seed in range(16)]
    together = _speed(base, runs, max(1, rows // 16), tokens, device)
    read = 2.0 * base.decoder.num_parameters
    bound = bandwidth(device) / read
    return {
        "row_tokens_per_s": round(one, 1),
        "bandwidth_gb_per_s": round(bound * read * 1e-9, 1),
        "of_the_bandwidth": round(one / bound, 3),
        "eager_row_tokens_per_s": round(eager_one, 1),
        "eager_of_the_bandwidth": round(eager_one / bound, 3),
        "rows_tokens_per_s": round(many),
        "eager_rows_tokens_per_s": round(eager_many),
        "one_run_tokens_per_s": round(alone),
        "sixteen_runs_tokens_per_s": round(together),
        "sixteen_runs": round(together / alone, 3),
    }


def _speed(
    base: Base,
    runs: Sequence[Weights | None],
    n: int,
    tokens: int,
    device: str,
    capture: How = "auto",
) -> float:
    """Without what prompts and captures take: by the difference of two lengths, each at its best, on a
    generator that has seen their shapes."""
    generator = Generator(base, cache_bytes=CACHE_BYTES, capture=capture)
    lengths = (tokens, tokens // 4)
    long, short = (
        min(_seconds(generator, runs, n, count, device) for _ in range(4)) for count in lengths
    )
    return len(runs) * n * (lengths[0] - lengths[1]) / (long - short)


def _seconds(
    generator: Generator, runs: Sequence[Weights | None], n: int, tokens: int, device: str
) -> float:
    _settle(device)
    begun = time.perf_counter()
    finished(generator, requests_of(runs, n, tokens))
    _settle(device)
    return time.perf_counter() - begun


def _generate(path: Path, device: str, tokens: int, rows: int) -> float:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, local_files_only=True
    ).to(device)
    ids = torch.tensor([PROMPT] * rows, device=device)

    def run(count: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=0, pad_token_id=0
        )
        _settle(device)
        begun = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        _settle(device)
        return time.perf_counter() - begun

    long, short = (min(run(count) for _ in range(3)) for count in (tokens, tokens // 4))
    return round(rows * (tokens - tokens // 4) / (long - short), 1)


def bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes per second that a copy reads and writes together."""
    source = torch.empty(size if device == "cuda" else size >> 4, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        _settle(device)
        begun = time.perf_counter()
        target.copy_(source)
        _settle(device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * source.numel() / best


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
