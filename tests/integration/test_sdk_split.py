"""Calls over a limit against a real stack: the same weights, numbers and draws as by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from rewardsignal import _split
from rewardsignal._schemas import MAX_BATCH
from tests.support.stack import RunningStack

OPTIONS: dict[str, Any] = {"lora_r": 4, "learning_rate": 1e-2, "seed": 3}
COUNT = 200


def rows(count: int) -> list[dict[str, Any]]:
    """Of different lengths and weights, so that no mean of means is the mean of the whole."""
    return [
        {
            "tokens": [5 + (7 * row + place) % 400 for place in range(3 + row % 9)],
            "weights": [0.0, *(0.25 + (row + place) % 4 for place in range(2 + row % 9))],
        }
        for row in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{row}:", "chosen": "yes" * (1 + row % 3), "rejected": "no" * (1 + row % 2)}
        for row in range(count)
    ]


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.api_key, stack.base_url) as found:
        yield found


@pytest.fixture
def runs(client: rs.SignalClient) -> Iterator[tuple[rs.SignalRun, rs.SignalRun]]:
    """Two runs that begin alike: one for whole calls, one for the same by hand."""
    pair = (client.create_run("tiny", **OPTIONS), client.create_run("tiny", **OPTIONS))
    yield pair
    for run in pair:
        run.cancel()


@pytest.mark.parametrize(
    ("loss_fn", "batch", "options"),
    [
        ("causal_lm", rows(COUNT), {}),
        ("cross_entropy", rows(COUNT), {}),
        ("dpo", preferences(COUNT), {"beta": 0.2}),
    ],
)
def test_a_batch_in_parts_trains_as_by_hand(
    runs: tuple[rs.SignalRun, rs.SignalRun],
    loss_fn: str,
    batch: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    whole, by_hand = runs
    together = whole.forward_backward(batch, loss_fn, **options)
    parts = [
        by_hand.forward_backward(batch[begin : begin + MAX_BATCH], loss_fn, **options)
        for begin in range(0, COUNT, MAX_BATCH)
    ]
    assert whole.status().next_seq == 3
    divisor = sum(part.divisor for part in parts)
    assert together.divisor == pytest.approx(divisor)
    assert together.loss == pytest.approx(sum(p.loss * p.divisor for p in parts) / divisor)
    assert together.num_tokens == sum(part.num_tokens for part in parts)
    assert together.metrics.keys() == parts[0].metrics.keys()
    for name, value in together.metrics.items():
        assert value == pytest.approx(combined(parts, name)), name
    step, other = whole.optim_step(), by_hand.optim_step()
    # The norm of the whole gradient, which no part knows.
    assert together.grad_norm == pytest.approx(step.grad_norm)
    assert step.grad_norm == other.grad_norm
    assert whole.certificate().sha256 == by_hand.certificate().sha256


def combined(parts: list[Any], name: str) -> float:
    values = [part.metrics[name] for part in parts]
    if name not in parts[0].metric_counts:
        return math.fsum(values)
    counts = [part.metric_counts[name] for part in parts]
    return math.fsum(v * c for v, c in zip(values, counts, strict=True)) / math.fsum(counts)


def test_parts_are_the_whole_of_a_larger_limit(
    runs: tuple[rs.SignalRun, rs.SignalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server takes at once, cut all the same: equal but for rounding."""
    whole, cut = runs
    batch = rows(64)
    at_once = whole.forward_backward(batch)
    monkeypatch.setattr(_split, "MAX_BATCH", 10)
    in_parts = cut.forward_backward(batch)
    assert cut.status().next_seq == 8
    for name in ("loss", "loss_sum", "divisor", "num_tokens", "grad_norm", "accumulated_grad_norm"):
        assert in_parts[name] == pytest.approx(at_once[name], rel=1e-5), name
    assert in_parts.metrics == pytest.approx(at_once.metrics, rel=1e-4)
    assert in_parts.metric_counts == pytest.approx(at_once.metric_counts)
    assert cut.optim_step().grad_norm == pytest.approx(whole.optim_step().grad_norm, rel=1e-5)
    after = [run.forward(batch[:8]).rows for run in runs]
    for one, other in zip(*after, strict=True):
        assert one.logprobs[1:-1] == pytest.approx(other.logprobs[1:-1], abs=1e-4)


def test_accumulate_is_asked_of_the_first_part(runs: tuple[rs.SignalRun, rs.SignalRun]) -> None:
    whole, by_hand = runs
    whole.forward_backward(rows(5))
    fresh = whole.forward_backward(rows(COUNT), accumulate=False)
    assert fresh.accumulated_calls == 2
    assert fresh.grad_norm == by_hand.forward_backward(rows(COUNT)).grad_norm
    again = whole.forward_backward(rows(COUNT))
    assert again.accumulated_calls == 4
    assert math.isnan(again.grad_norm)
    assert again.accumulated_grad_norm > 0


def test_rows_of_a_forward_in_parts(runs: tuple[rs.SignalRun, rs.SignalRun]) -> None:
    run = runs[0]
    batch = rows(COUNT)
    whole = run.forward(batch)
    assert [row.example for row in whole.rows] == list(range(COUNT))
    assert [row.token_ids for row in whole.rows] == [one["tokens"] for one in batch]
    last = run.forward(batch[-3:]).rows
    assert [row.logprobs[1:-1] for row in whole.rows[-3:]] == [
        pytest.approx(row.logprobs[1:-1], abs=1e-4) for row in last
    ]
    pairs = run.forward(preferences(130)).rows
    assert [row.example for row in pairs] == [example for example in range(130) for _ in "cr"]


def test_a_seed_draws_the_same_in_parts(
    runs: tuple[rs.SignalRun, rs.SignalRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[0]
    prompts = [f"{index}:" for index in range(24)]
    options: Any = {"max_tokens": 4, "n": 3, "seed": 11, "stop": [], "weights": "base"}
    at_once = run.sample(prompts, **options)
    monkeypatch.setattr(_split, "MAX_SAMPLES", 15)
    monkeypatch.setattr(_split, "MAX_BATCH", 5)
    in_parts = run.sample(prompts, **options)
    assert in_parts.texts == at_once.texts
    assert in_parts.prompt_token_ids == at_once.prompt_token_ids
    assert (
        run.inference("base", batch_size=7).batch_sample(
            prompts, max_tokens=4, n=3, seed=11, stop=[]
        )
        == at_once.texts
    )


def test_a_wrong_example_refuses_the_whole(runs: tuple[rs.SignalRun, rs.SignalRun]) -> None:
    run = runs[0]
    batch = [*rows(150), {"text": ""}]
    with pytest.raises(rs.ValidationError) as caught:
        run.forward_backward(batch)
    assert caught.value.param == "batch_data.150.text"
    assert run.status().next_seq == 1
    with pytest.raises(rs.ConflictError):
        run.optim_step()
