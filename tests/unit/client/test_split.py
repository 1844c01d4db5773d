"""Calls over a limit: where they are cut, what the parts are asked for, the numbers of the whole."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import rewardsignal as rs
from rewardsignal import _split
from rewardsignal._schemas import MAX_BATCH, MAX_SAMPLES
from rewardsignal._split import parts_of
from tests.unit.client.test_async import RUN_ID, in_loop, nobody_waits
from tests.unit.client.wire import Journal, refusal


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def run(journal: Journal) -> Iterator[rs.SignalRun]:
    with journal.client() as client:
        yield client.run(RUN_ID)


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": str(index)} for index in range(count)]


def cut(kind: str, **body: Any) -> list[Mapping[str, Any]]:
    return [part for part, _ in parts_of(kind, body)]


# Where calls are cut.


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (128, [128]), (129, [128, 1]), (1000, [128] * 7 + [104])]
)
@pytest.mark.parametrize("kind", ["forward_backward", "forward"])
def test_batches_over_the_limit(kind: str, count: int, sizes: list[int]) -> None:
    parts = cut(kind, batch_data=texts(count), loss_fn="causal_lm")
    assert [len(part["batch_data"]) for part in parts] == sizes
    assert [example for part in parts for example in part["batch_data"]] == texts(count)


def test_batches_over_the_bytes_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_split, "MAX_OPERATION_BYTES", 5000)
    batch = [{"text": "x" * size} for size in (900, 900, 900, 900, 4000, 10, 10, 9000)]
    parts = parts_of("forward_backward", {"batch_data": batch, "loss_fn": "causal_lm"})
    assert [one for part, _ in parts for one in part["batch_data"]] == batch
    assert len(parts) > 2
    for part, content in parts:
        assert len(content) <= 5100 or len(part["batch_data"]) == 1


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        ("kto", {}),
        ("grpo", {"loss_type": "bnpo"}),
        ("ppo", {"scale_rewards": "batch"}),
    ],
)
def test_what_is_of_one_call_is_sent_whole(loss_fn: str, options: dict[str, Any]) -> None:
    parts = cut("forward_backward", batch_data=texts(300), loss_fn=loss_fn, loss_kwargs=options)
    assert [len(part["batch_data"]) for part in parts] == [300]


def test_only_the_first_part_forgets_what_was_accumulated() -> None:
    parts = cut("forward_backward", batch_data=texts(300), loss_fn="dpo", accumulate=False)
    assert [part.get("accumulate") for part in parts] == [False, None, None]
    assert {part["loss_fn"] for part in parts} == {"dpo"}


@pytest.mark.parametrize("bad", [None, "text", 7, {"text": "a"}])
def test_what_is_no_list_is_left_to_the_server(bad: Any) -> None:
    assert cut("forward_backward", batch_data=bad) == [{"batch_data": bad}]
    assert cut("sample", prompts="x" * 300, n=2) == [{"prompts": "x" * 300, "n": 2}]
    assert len(cut("forward_backward", batch_data=texts(129), loss_kwargs=None)) == 2


@pytest.mark.parametrize(
    ("prompts", "n", "sizes"),
    [
        (128, 1, [128]),
        (128, 8, [128]),
        (129, 1, [128, 1]),
        (128, 16, [64, 64]),
        (3, MAX_SAMPLES, [1, 1, 1]),
        (3, MAX_SAMPLES + 1, [3]),
        (3, 0, [3]),
        (300, "many", [300]),
    ],
)
def test_samples_over_the_limit(prompts: int, n: Any, sizes: list[int]) -> None:
    parts = cut("sample", prompts=["a"] * prompts, n=n)
    assert [len(part["prompts"]) for part in parts] == sizes


def test_parts_of_a_sample_draw_from_its_rows() -> None:
    parts = cut("sample", prompts=list("abcdefgh") * 40, n=4, seed=1)
    assert [part["first_row"] for part in parts] == [0, 4 * MAX_BATCH, 8 * MAX_BATCH]


def test_a_part_of_a_part_draws_from_the_rows_of_the_whole() -> None:
    parts = cut("sample", prompts=["a"] * 200, n=2, first_row=10)
    assert [part["first_row"] for part in parts] == [10, 10 + 2 * MAX_BATCH]


def test_a_sample_that_is_not_cut_is_as_it_was_given() -> None:
    assert cut("sample", prompts=["a"], n=2) == [{"prompts": ["a"], "n": 2}]


# What the whole answers.


def gradients(numbers: random.Random, calls: int) -> dict[str, Any]:
    divisor = numbers.uniform(1, 50)
    return {
        "step": 3,
        "loss_sum": numbers.uniform(-9, 9),
        "divisor": divisor,
        "num_tokens": numbers.randrange(1, 99),
        "grad_norm": numbers.random(),
        "accumulated_grad_norm": numbers.random(),
        "accumulated_calls": calls,
        "metrics": {
            "accuracy": numbers.random(),
            "kl": numbers.random(),
            "input_tokens": float(numbers.randrange(1, 99)),
        },
        "metric_counts": {"accuracy": numbers.uniform(1, 9), "kl": divisor},
        "timings": {"queued_ms": numbers.random(), "execute_ms": numbers.random()},
    }


def mean(results: list[dict[str, Any]], name: str) -> float:
    """By its definition: everything that was averaged, over how much there was."""
    whole = [(one["metrics"][name], one["metric_counts"][name]) for one in results]
    return sum(value * count for value, count in whole) / sum(count for _, count in whole)


def test_numbers_of_a_whole_batch(journal: Journal, run: rs.SignalRun) -> None:
    numbers = random.Random(5)
    future = run.forward_backward_async(texts(300))
    answers = [gradients(numbers, calls) for calls in (1, 2, 3)]
    threading.Timer(0.05, journal.answer_with, answers).start()
    whole = future.result(5)
    assert math.isclose(whole.loss_sum, sum(one["loss_sum"] for one in answers))
    assert math.isclose(whole.divisor, sum(one["divisor"] for one in answers))
    assert math.isclose(whole.loss, whole.loss_sum / whole.divisor)
    assert whole.num_tokens == sum(one["num_tokens"] for one in answers)
    for name in ("accuracy", "kl"):
        assert math.isclose(whole.metrics[name], mean(answers, name))
    assert whole.metrics["input_tokens"] == sum(one["metrics"]["input_tokens"] for one in answers)
    assert whole.grad_norm == whole.accumulated_grad_norm == answers[2]["accumulated_grad_norm"]
    assert whole.timings.execute_ms == pytest.approx(
        sum(one["timings"]["execute_ms"] for one in answers)
    )
    assert whole.timings.queued_ms == answers[0]["timings"]["queued_ms"]
    assert future.seq == whole.seq == 3
    assert future.result() is whole


def test_a_norm_that_cannot_be_known_is_no_number(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(129))
    journal.answer_with(*(gradients(random.Random(1), calls) for calls in (3, 4)))
    assert math.isnan(future.result(5).grad_norm)


def test_blocking_form_is_split_too(journal: Journal, run: rs.SignalRun) -> None:
    answers = [gradients(random.Random(2), calls) for calls in (1, 2)]

    def answer() -> None:
        while len(journal.futures) < 2:
            threading.Event().wait(0.01)
        journal.answer_with(*answers)

    threading.Thread(target=answer).start()
    assert run.forward_backward(texts(200)).num_tokens == 2 * answers[0]["num_tokens"]
    assert len(journal.keys) == 1


def test_rows_name_their_examples_in_the_whole(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_async(texts(130))
    rows = [[{"example": example} for example in range(128)], [{"example": 0}, {"example": 1}]]
    journal.answer_with(*({"rows": one, "metrics": {"input_tokens": 5.0}} for one in rows))
    whole = future.result(5)
    assert [row.example for row in whole.rows] == list(range(130))
    assert whole.metrics == {"input_tokens": 10.0}


def test_log_probabilities_name_their_examples_too(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(130), logprobs=True)
    rows = [[{"example": example, "logprobs": [-1.0]} for example in range(n)] for n in (128, 2)]
    made = [gradients(random.Random(3), calls) for calls in (1, 2)]
    journal.answer_with(*({**one, "rows": own} for one, own in zip(made, rows, strict=True)))
    assert [row.example for row in future.result(5).rows or []] == list(range(130))


def test_samples_are_in_the_order_of_the_prompts(journal: Journal, run: rs.SignalRun) -> None:
    future = run.sample_async(list(map(str, range(130))))
    assert [len(body["prompts"]) for _, body in journal.bodies] == [128, 2]
    journal.answer_with(*(
        {
            "samples": [[{"text": prompt}] for prompt in body["prompts"]],
            "prompt_token_ids": [[int(prompt)] for prompt in body["prompts"]],
            "outputs": body["prompts"],
            "metrics": {"generated_tokens": 4.0},
        }
        for _, body in journal.bodies
    ))  # fmt: skip
    whole = future.result(5)
    assert whole.texts == whole.outputs == list(map(str, range(130)))
    assert [ids[0] for ids in whole.prompt_token_ids] == list(range(130))
    assert whole.prompt_logprobs is None
    assert whole[129] == "129"
    assert whole.metrics == {"generated_tokens": 8.0}


# Its life.


def test_a_part_that_fails_fails_the_whole_once_all_have_ended(
    journal: Journal, run: rs.SignalRun
) -> None:
    future = run.forward_backward_async(texts(300))
    journal.finish()
    journal.finish(code="non_finite", message="Not a number.")
    assert not future.done()
    assert future.status().status == "failed"
    with pytest.raises(rs.SignalTimeoutError):
        future.result(0.1)
    journal.finish()
    with pytest.raises(rs.InvalidOperationError, match="Not a number"):
        future.result(5)
    assert future.done()
    assert isinstance(future.exception(), rs.InvalidOperationError)


def test_status_is_of_the_first_that_has_not_ended(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(300))
    journal.finish()
    assert future.status().future_id == "fut_2"
    assert future.future_id == "fut_3"
    assert repr(future) == "<APIFuture forward_backward of 3 operations, seq=3>"


def test_cancel_takes_what_it_can(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(300))
    journal.finish()
    assert future.cancel()
    assert not future.cancel()
    with pytest.raises(rs.OperationCancelledError):
        future.result(5)


def test_it_is_awaited_called_back_and_completed(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(300))
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    answers = [gradients(random.Random(3), calls) for calls in (1, 2, 3)]
    threading.Timer(0.05, journal.answer_with, answers).start()

    async def wait() -> int:
        return (await future).num_tokens

    assert in_loop(wait()) == 3 * answers[0]["num_tokens"]
    assert heard == [future]
    assert [one.seq for one in rs.as_completed([future])] == [3]
    assert [one.seq for one in rs.wait_all([future], 5)] == [3]


def test_a_wait_that_is_given_up_leaves_nothing(journal: Journal, run: rs.SignalRun) -> None:
    future = run.forward_backward_async(texts(300))
    completed = rs.as_completed([future], timeout=0.05)
    with pytest.raises(rs.SignalTimeoutError, match="1 futures"):
        next(completed)
    with journal.client() as client:
        assert nobody_waits(client)
    assert not (run._poller._waiters or run._poller._watchers)


def test_a_split_call_keeps_its_place_in_a_pipeline(journal: Journal, run: rs.SignalRun) -> None:
    with run.pipeline() as pipe:
        pipe.forward_backward(texts(200))
        pipe.optim_step()
    kinds = [kind for kind, _ in journal.bodies]
    assert kinds == ["forward_backward", "forward_backward", "optim_step"]
    assert len(journal.keys) == 1


def test_a_refused_part_takes_the_others_back(
    journal: Journal, run: rs.SignalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardsignal._submit.MAX_BYTES", 1000)
    batch = [*texts(300), {"text": "bad"}]
    journal.refuses = lambda _, body: (
        refusal(422, "validation_error", param="batch_data.44.text", details=[
            {"param": "batch_data.44.text", "code": "validation_error", "message": "Bad."}
        ]) if batch[-1] in body["batch_data"] else None
    )  # fmt: skip
    with pytest.raises(rs.ValidationError) as caught:
        run.forward_backward(batch)
    assert caught.value.param == caught.value.details[0]["param"] == "batch_data.300.text"
    assert [one["status"] for one in journal.futures] == ["cancelled"] * 2


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("operations.1.batch_data.2.text", "batch_data.130.text"),
        ("operations.0.batch_data.2", "batch_data.2"),
        ("operations.1.loss_fn", "loss_fn"),
        ("batch_data.7.tokens.3", "batch_data.7.tokens.3"),
        ("operations.1.loss_kwargs.beta", "loss_kwargs.beta"),
        (None, None),
    ],
)
def test_wrong_fields_are_named_as_in_the_call(
    journal: Journal, run: rs.SignalRun, param: str | None, named: str | None
) -> None:
    journal.refuses = lambda *_: refusal(422, "validation_error", param=param)
    with pytest.raises(rs.ValidationError) as caught:
        run.forward_backward_async(texts(200))
    assert caught.value.param == named
    pipe = run.pipeline()
    pipe.forward_backward(texts(200))
    pipe.optim_step()
    with pytest.raises(rs.ValidationError) as caught:
        pipe.flush()
    assert caught.value.param == param
