"""The engine on a GPU: gradients against float64 on the CPU, samples against the trainer's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.bench.gpu_models import write_model
from tests.bench.gpu_numbers import SMALL, check_numbers
from tests.bench.gpu_sampling import (
    CACHE_BYTES,
    adapter,
    check_sampling,
    finished,
    graph_capture,
    requests_of,
    sampled,
)
from workers.engine.base import load_base
from workers.engine.generation import Generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_numbers_hold() -> None:
    assert [one for one in check_numbers() if not one["holds"]] == []


def test_numbers_of_sampling_hold() -> None:
    assert [one for one in check_sampling() if not one["holds"]] == []


def test_graphs_give_what_eager_steps_give(tmp_path: Path) -> None:
    base = load_base(write_model(SMALL, tmp_path), dtype="float32", device="cuda")
    runs, graphs = [adapter(base, 1, 4), None, adapter(base, 2, 16)], graph_capture("cuda")
    assert graphs is not None
    replayed = sampled(base, runs, 3, 64, capture=graphs)
    assert graphs.captured
    for one, other in zip(replayed, sampled(base, runs, 3, 64, capture=None), strict=True):
        for a, b in zip(one.samples[0], other.samples[0], strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_graph_sees_new_weights(tmp_path: Path) -> None:
    base = load_base(write_model(SMALL, tmp_path), dtype="float32", device="cuda")
    graphs = graph_capture("cuda")
    assert graphs is not None
    generator = Generator(base, cache_bytes=CACHE_BYTES, capture=graphs)
    seen = []
    for seed in (1, 2):
        requests = requests_of([adapter(base, seed, 8)], 1, 48)
        (output,) = finished(generator, requests)
        (expected,) = sampled(base, [requests[0].weights], 1, 48, capture=None)
        assert output.samples[0][0].token_ids == expected.samples[0][0].token_ids
        seen.append(output.samples[0][0].token_ids)
    assert graphs.captured == 1 and seen[0] != seen[1]
