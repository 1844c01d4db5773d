"""A user's program that uses the whole surface; mypy --strict reads it, nothing runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, assert_type

import rewardsignal as rs
from rewardsignal import APIFuture, FutureGroup
from rewardsignal._schemas import (
    Certificate,
    ForwardBackwardResult,
    ForwardResult,
    ForwardRow,
    MetricRow,
    Model,
    OptimStepResult,
    Run,
    RunClosed,
    RunEvent,
    RunMetrics,
    SampleResult,
    SaveStateResult,
    TokenizeResult,
)

BATCH: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"text": "Hello", "weight": 2},
]


def primitives(run: rs.SignalRun) -> None:
    result = run.forward_backward(BATCH, "dpo", accumulate=False, beta=0.1)
    assert_type(result, ForwardBackwardResult)
    assert_type(result.loss, float)
    assert_type(result.metrics, dict[str, float])
    assert_type(run.forward(iter(BATCH), top_k=2), ForwardResult)
    assert_type(run.optim_step(1e-4, grad_clip_norm=1.0), OptimStepResult)
    sampled = run.sample([[1, 2, 3]], max_tokens=5, n=2, stop=["\n"], weights={"artifact": "a"})
    assert_type(sampled, SampleResult)
    assert_type(sampled.texts, list[str])
    assert_type(run.save_state("name", "state"), SaveStateResult)
    run.load_state("name", run_id="run_1", optimizer=False)
    run.forward_backward_custom(BATCH, squares)
    for future in run.submit([{"kind": "optim_step"}]):
        print(future.seq, future.future_id)
    with run.pipeline(8) as pipe:
        assert_type(pipe.forward_backward(BATCH), APIFuture[ForwardBackwardResult])
        pipe.optim_step()
        pipe.flush()


def squares(rows: Sequence[ForwardRow]) -> tuple[float, list[list[float]]]:
    values = [[value or 0.0 for value in row.logprobs] for row in rows]
    return sum(v * v for row in values for v in row), [[2 * v for v in row] for row in values]


def futures(run: rs.SignalRun) -> None:
    future = run.forward_backward_async(BATCH)
    assert_type(future, APIFuture[ForwardBackwardResult])
    assert_type(future.result(timeout=1.0), ForwardBackwardResult)
    assert_type(future.exception(), rs.SignalAPIError | None)
    assert_type(future.done(), bool)
    assert_type(future.cancel(), bool)
    future.add_done_callback(lambda one: print(one.result().loss))
    group: FutureGroup[SampleResult] = FutureGroup()
    group.add(run.sample_async("Once"))
    for one in group.as_completed(timeout=5):
        assert_type(one, APIFuture[SampleResult])
    for result in group.wait_all():
        assert_type(result, SampleResult)
    assert_type(rs.wait_all([future]), list[ForwardBackwardResult])
    assert_type(rs.as_completed([future]), Iterator[APIFuture[ForwardBackwardResult]])


def the_run(client: rs.SignalClient, run: rs.SignalRun) -> None:
    assert_type(client.models(), list[Model])
    assert_type(client.list_models(), list[str])
    for listed in client.list_runs(status="ready", label="a=b"):
        assert_type(listed, Run)
    assert_type(client.list_runs()[0].run_id, str)
    assert_type(client.run("run_1"), rs.SignalRun)
    assert_type(run.status().current_step, int)
    assert_type(run.metrics(), RunMetrics)
    assert_type(run.metrics().series("loss"), tuple[list[int], list[float]])
    assert_type(run.log({"reward": 0.4}, step=3), MetricRow)
    for event in run.watch():
        assert_type(event, RunEvent)
    assert_type(run.download("final", Path("adapter")), Path)
    assert_type(run.branch(4, learning_rate=1e-3), rs.SignalRun)
    assert_type(run.certificate(), Certificate)
    assert_type(run.replay().result().sha256, str)
    assert_type(run.complete(), RunClosed)
    assert_type(run.tokenize("a"), TokenizeResult)
    assert_type(run.tokenizer.encode("a"), list[int])
    run.pause()
    run.resume("rebuilt")
    run.migrate()
    run.delete()


def loops(client: rs.SignalClient, run: rs.SignalRun) -> None:
    training = client.training(run.run_id, timeout=10.0)
    assert_type(training.train_batch(BATCH, "causal_lm", 1e-4).loss, float)
    assert_type(training.train_epoch([BATCH], progress=False).avg_loss, float)
    assert_type(training.get_metrics(), dict[str, list[float]])
    inference = run.inference("base", batch_size=8)
    assert_type(inference.sample("Once", max_tokens=4), list[str])
    assert_type(inference.batch_sample(["a"], 2), list[str])
    assert_type(inference.stream_sample("Once"), Iterator[str])
    with run.stream_sample("Once", max_tokens=4) as stream:
        for token in stream:
            assert_type(token, rs.StreamToken)
    assert_type(stream.result(), SampleResult)


def failures(run: rs.SignalRun) -> str | None:
    try:
        run.optim_step()
    except rs.RateLimitError as error:
        assert_type(error.retry_after, float | None)
    except (rs.ConflictError, rs.ValidationError) as error:
        return error.code or error.param
    except rs.SignalAPIError as error:
        return error.request_id
    return None


async def in_a_loop() -> None:
    async with rs.AsyncSignalClient(timeout=5.0) as client:
        async with await client.create_run("tiny", lora_r=8, labels={"a": "b"}) as run:
            assert_type(run, rs.AsyncSignalRun)
            forward, step = await asyncio.gather(
                run.forward_backward_async(BATCH, "dpo", beta=0.1), run.optim_step_async(1e-4)
            )
            assert_type(forward, APIFuture[ForwardBackwardResult])
            assert_type((await forward).loss, float)
            assert_type(await step, OptimStepResult)
            assert_type(await run.sample("Once", max_tokens=4), SampleResult)
            async for token in run.stream_sample("Once"):
                assert_type(token, rs.StreamToken)
            group = FutureGroup([await run.sample_async("a") for _ in range(4)])
            assert_type(await group.wait_all(), list[SampleResult])
            async for one in group.as_completed():
                assert_type(one, APIFuture[SampleResult])
            async with run.pipeline() as pipe:
                pipe.optim_step()
            tokenizer = await run.tokenizer()
            assert_type(tokenizer.decode([1]), str)
            assert_type(await run.branch(4), rs.AsyncSignalRun)
            events: AsyncIterator[RunEvent] = run.watch()
            async for event in events:
                print(event.type)
        async for listed in client.list_runs():
            assert_type(listed, Run)
        assert_type(await client.optim_step(run.run_id), OptimStepResult)


def main() -> None:
    with rs.SignalClient(retry_for=10.0) as client, client.create_run("tiny") as run:
        primitives(run)
        futures(run)
        the_run(client, run)
        loops(client, run)
        print(failures(run))
    asyncio.run(in_a_loop())
