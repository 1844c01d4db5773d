"""Programs written for the first Signal's SDK, where they were right: its documented calls, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from rewardsignal import (
    APIFuture,
    AsyncSignalClient,
    AsyncSignalRun,
    AuthenticationError,
    AuthorizationError,
    FutureGroup,
    InferenceClient,
    NotFoundError,
    RateLimitError,
    ServerError,
    SignalAPIError,
    SignalClient,
    SignalConnectionError,
    SignalRun,
    SignalTimeoutError,
    TrainingClient,
    ValidationError,
)
from tests.support.stack import RunningStack

SFT = [
    {"text": "The quick brown fox jumps over the lazy dog."},
    {"text": "Machine learning is transforming technology."},
]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
DPO = [{"prompt": "Say yes.", "chosen": "yes", "rejected": "no"}]


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[SignalClient]:
    with SignalClient(api_key=stack.api_key, base_url=stack.base_url, timeout=300) as found:
        yield found


@pytest.fixture(scope="module")
def run(client: SignalClient) -> Iterator[SignalRun]:
    found = client.create_run(
        base_model="tiny",
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_target_modules=None,
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=0.01,
        max_seq_length=512,
    )
    yield found
    found.cancel()


def test_the_client_by_run_id(client: SignalClient, run: SignalRun) -> None:
    run_id = run.run_id
    assert "tiny" in client.list_models()
    result = client.forward_backward(run_id=run_id, batch=SFT, accumulate=False)
    assert result["loss"] == result.loss > 0
    assert result["grad_norm"] > 0
    step = client.optim_step(run_id=run_id, learning_rate=1e-4)
    assert step["step"] >= 1
    assert step["learning_rate"] == 1e-4
    outputs = client.sample(
        run_id=run_id, prompts=["The meaning of life is"],
        max_tokens=5, temperature=0.7, top_p=0.9, return_logprobs=True,
    )  # fmt: skip
    assert [type(text) for text in outputs] == [str]
    saved = client.save_state(run_id=run_id, mode="adapter")
    assert saved["artifact_uri"]
    status = client.get_run_status(run_id)
    assert (status["run_id"], status["base_model"]) == (run_id, "tiny")
    assert status["current_step"] == step["step"]
    metrics = client.get_run_metrics(run_id)
    assert metrics["run_id"] == run_id
    assert "loss" in metrics["metrics"][0]["metrics"]
    runs = client.list_runs()
    assert run_id in [one["run_id"] for one in runs]
    assert len(runs) >= 1
    assert runs[0]["base_model"] == "tiny"


def test_the_losses_that_it_advertised(client: SignalClient, run: SignalRun) -> None:
    result = client.forward_backward(
        run.run_id, DPO, loss_fn="dpo", loss_kwargs={"beta": 0.1, "label_smoothing": 0.0}
    )
    assert {"rewards/margins", "rewards/accuracies"} <= result["metrics"].keys()
    client.optim_step(run.run_id)
    assert client.forward_backward(run.run_id, CHAT)["loss"] > 0
    client.optim_step(run.run_id)


def test_text_helpers_by_run_id(client: SignalClient, run: SignalRun) -> None:
    tokens = client.tokenize(run.run_id, "Hello, world!", add_special_tokens=False)
    assert client.detokenize(run.run_id, tokens["token_ids"][0])["text"] == "Hello, world!"
    assert client.get_tokenizer_info(run.run_id)["vocab_size"] > 0
    assert client.get_model_info(run.run_id)["num_trainable_parameters"] > 0
    chat = client.apply_chat_template(
        run.run_id, [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert chat["token_ids"]
    assert "Hi" in chat["text"]


def test_the_run(run: SignalRun) -> None:
    before = run.get_status()["current_step"]
    losses = []
    for _ in range(3):
        result = run.forward_backward(batch=SFT)
        run.optim_step()
        losses.append(result["loss"])
    assert losses[-1] < losses[0]
    assert run.get_status()["current_step"] == before + 3
    assert run.sample(prompts=["Once"], max_tokens=4, temperature=0.7)["outputs"][0] is not None
    assert run.save_state(mode="adapter")["artifact_uri"]
    assert run.get_metrics()["metrics"]


def test_the_training_client(client: SignalClient, run: SignalRun) -> None:
    with pytest.warns(DeprecationWarning, match="retry_for"):
        found = client.training(run.run_id, timeout=3600, max_retries=3)
    with found as training:
        assert isinstance(training, TrainingClient)
        result = training.train_batch(SFT, learning_rate=1e-4)
        assert {"loss", "grad_norm", "step"} <= set(result)
        epoch = training.train_epoch([SFT, CHAT, SFT], progress=False)
        assert epoch["num_batches"] == 3
        assert epoch["avg_loss"] > 0
        assert epoch["avg_grad_norm"] > 0
        assert epoch["final_step"] == result["step"] + 3
        assert training.save_checkpoint()["artifact_uri"]
        assert len(training.get_metrics()["loss"]) == 4
        assert training.forward_backward(SFT)["loss"] > 0
        assert training.optim_step(learning_rate=1e-4)["step"] == epoch["final_step"] + 1


def test_the_inference_client(client: SignalClient, run: SignalRun) -> None:
    inference = client.inference(run.run_id, timeout=30, batch_size=2)
    assert isinstance(inference, InferenceClient)
    texts = inference.sample(["a", "b"], max_tokens=3, temperature=0.7, top_p=0.9)
    assert [type(text) for text in texts] == [str, str]
    assert len(inference.batch_sample(["a", "b", "c"], batch_size=2, max_tokens=3)) == 3
    assert isinstance("".join(inference.stream_sample("Once", max_tokens=5)), str)
    assert inference.detokenize(inference.tokenize("Hello")) == "Hello"
    inference.enable_cache()
    inference.clear_cache()
    assert inference.get_cache_stats()["size"] == 0
    inference.disable_cache()
    step = run.get_status()["current_step"]
    run.save_state(name=f"at-{step}")
    pinned = client.inference(run.run_id, step=step)
    assert pinned.sample(["a"], max_tokens=3, temperature=0.0)
    assert isinstance(run.inference(), InferenceClient)
    assert isinstance(run.training(), TrainingClient)


def test_the_double_await(stack: RunningStack) -> None:
    async def work() -> None:
        async with AsyncSignalClient(api_key=stack.api_key, base_url=stack.base_url) as client:
            run = await client.create_run(base_model="tiny", lora_r=8)
            assert isinstance(run, AsyncSignalRun)
            assert "tiny" in await client.list_models()

            forward = await run.forward_backward_async(batch=SFT)
            step = await run.optim_step_async()
            assert isinstance(forward, APIFuture)
            result = await forward
            assert result["loss"] > 0
            assert (await step)["step"] == 1

            result = await run.forward_backward(batch=SFT)
            # It did not exist there, although the run called it.
            assert (await run.optim_step())["step"] == 2
            assert (await run.sample(prompts=["a"], max_tokens=2))["outputs"]
            assert (await run.save_state(mode="adapter"))["artifact_uri"]
            assert (await run.get_status())["current_step"] == 2
            assert (await run.get_metrics())["metrics"]

            group: FutureGroup[Any] = FutureGroup()
            for _ in range(4):
                group.add(await run.sample_async(prompts=["a"], max_tokens=2))
            results = await group.wait_all()
            assert len(results) == len(group) == 4

            future = await client.forward_backward_async(run.run_id, SFT)
            assert (await future)["loss"] > 0
            assert (await client.optim_step(run.run_id))["step"] == 3
            assert [type(text) for text in await client.sample(run.run_id, ["a"])] == [str]
            saved = await client.save_state_async(run.run_id, mode="adapter")
            assert (await saved)["artifact_uri"]
            assert (await client.get_run_status(run.run_id))["status"]
            assert run.run_id in [one["run_id"] async for one in client.list_runs()]
            await run.cancel()

    asyncio.run(work())


def test_a_future_waits_inside_a_running_loop(client: SignalClient, run: SignalRun) -> None:
    """There, `result` and `cancel` failed in a loop."""

    async def work() -> None:
        future = run.forward_backward_async(SFT)
        assert future.result(timeout=60)["loss"] > 0
        assert future.cancel() is False
        assert (await run.optim_step_async())["step"] > 0

    asyncio.run(work())


def test_exceptions(stack: RunningStack, client: SignalClient, run: SignalRun) -> None:
    for kind in (
        AuthenticationError, AuthorizationError, NotFoundError, RateLimitError, ServerError,
        SignalConnectionError, SignalTimeoutError, ValidationError,
    ):  # fmt: skip
        assert issubclass(kind, SignalAPIError)
    with pytest.raises(NotFoundError) as missing:
        client.get_run_status("run_0000000000000000")
    assert missing.value.status_code == 404
    with pytest.raises(ValidationError) as wrong:
        run.forward_backward(batch=[])
    assert wrong.value.status_code == 422
    assert wrong.value.response_data["code"]
    assert wrong.value.message
    with (
        pytest.raises(AuthenticationError),
        SignalClient(api_key="sk-signal-wrong", base_url=stack.base_url) as nobody,
    ):
        len(nobody.list_runs())
    with pytest.raises(SignalConnectionError), SignalClient("sk-x", "http://127.0.0.1:9") as away:
        away.list_models()
