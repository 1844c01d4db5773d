"""The SDK and its command against a real stack."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rewardsignal as rs
from tests.support import stack as stacks
from tests.support.proxy import CuttingProxy
from tests.support.stack import RunningStack

BATCH: list[dict[str, Any]] = [{"tokens": list(range(5, 37))}, {"text": "The quick brown fox."}]


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.api_key, stack.base_url) as found:
        yield found


@pytest.fixture(scope="module")
def run(client: rs.SignalClient) -> Iterator[rs.SignalRun]:
    """One run for the tests that leave it usable."""
    found = client.create_run("tiny", name="sdk", labels={"suite": "sdk"}, lora_r=4, seed=1)
    yield found
    found.cancel()


def test_the_whole_loop(client: rs.SignalClient, tmp_path: Path) -> None:
    with client.create_run("tiny", lora_r=4, learning_rate=1e-2) as run:
        losses = []
        for _ in range(5):
            losses.append(run.forward_backward(BATCH).loss)
            step = run.optim_step(grad_clip_norm=1.0)
        assert losses[-1] < losses[0]
        assert step.step == step["step"] == 5
        saved = run.save_state("mine")
        assert run.download("mine", tmp_path).joinpath("adapter_config.json").is_file()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == saved.size_bytes
    assert run.status().status == "completed"
    assert [artifact.name for artifact in run.artifacts()] == ["mine", "final"]


def test_an_exception_leaves_the_run_for_another_process(
    client: rs.SignalClient, stack: RunningStack
) -> None:
    run = client.create_run("tiny", lora_r=4)
    run.forward_backward(BATCH)
    with pytest.raises(RuntimeError, match="mine"), run:
        raise RuntimeError("mine")
    with rs.SignalClient(stack.api_key, stack.base_url) as other:
        again = other.run(run.run_id)
        assert again.info.next_seq == 2
        again.resume()
        assert again.optim_step().seq == 2
        again.cancel()
    assert run.status().status == "cancelled"


def test_pipeline_takes_effect_in_order(run: rs.SignalRun) -> None:
    first = run.status().next_seq
    with run.pipeline(max_operations=8) as pipe:
        pairs = [(pipe.forward_backward(BATCH), pipe.optim_step(1e-4)) for _ in range(10)]
    futures: list[rs.APIFuture[Any]] = [future for pair in pairs for future in pair]
    results = rs.wait_all(futures, timeout=60)
    assert [result["seq"] for result in results] == list(range(first, first + 20))
    finished = run.operations(after_seq=first - 1).data
    assert [operation.future_id for operation in finished] == [one.future_id for one in futures]


def test_threads_share_a_run(run: rs.SignalRun) -> None:
    run.forward_backward(BATCH)
    seqs: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: seqs.append(run.sample_async("a", max_tokens=2).result(60).seq)
        )
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seqs)) == 12
    run.optim_step()


def test_failures_have_one_code_in_both_forms(run: rs.SignalRun) -> None:
    with pytest.raises(rs.ConflictError) as waited:
        run.optim_step()
    with pytest.raises(rs.ConflictError) as submitted:
        run.optim_step_async().result(60)
    assert waited.value.code == submitted.value.code == "no_gradients"
    assert isinstance(submitted.value, rs.OperationFailedError)


def test_every_wrong_field_is_named(run: rs.SignalRun) -> None:
    with pytest.raises(rs.ValidationError) as caught:
        run.forward_backward([{"text": ""}, {"tokens": [-1]}])
    assert {str(one["param"]).split(".")[1] for one in caught.value.details} == {"0", "1"}
    assert caught.value.request_id
    with pytest.raises(rs.ValidationError, match="nonsense"):
        run.optim_step(nonsense=1.0)  # type: ignore[call-arg]


def test_wait_that_ran_out_of_time_can_be_repeated(client: rs.SignalClient) -> None:
    run = client.create_run("tiny", lora_r=4)
    future = run.forward_backward_async(BATCH)
    with pytest.raises(rs.SignalTimeoutError):
        future.result(timeout=0)
    assert future.result(60).seq == 1
    assert client.future(future.future_id).result(60) == future.result()
    run.cancel()


def test_cancelled_future(client: rs.SignalClient) -> None:
    run = client.create_run("tiny", lora_r=4)
    futures = run.submit(
        [{"kind": "forward_backward", "batch_data": BATCH}, {"kind": "optim_step"}]
    )
    if futures[1].cancel():
        with pytest.raises(rs.OperationCancelledError):
            futures[1].result(60)
    run.cancel()


def test_lost_answers_double_nothing(stack: RunningStack) -> None:
    with (
        CuttingProxy(stack.base_url, every=3) as proxy,
        rs.SignalClient(stack.api_key, proxy.base_url) as client,
    ):
        run = client.create_run("tiny", lora_r=4, labels={"suite": "lost answers"})
        steps = []
        for _ in range(10):
            run.forward_backward_async(BATCH)
            steps.append(run.optim_step_async(1e-4))
        assert [future.result(60).step for future in steps] == list(range(1, 11))
        run.forward_backward(BATCH)
        assert run.optim_step(1e-4).step == 11
        assert run.log({"reward": 1.0}).step == 11
        assert run.status().next_seq == 23
        own = [row for row in run.metrics().metrics if row.source == "user"]
        assert len(own) == 1
        assert len(list(client.list_runs(label="suite=lost answers"))) == 1
        run.cancel()
        assert proxy.cut >= 10


def test_text_and_tokens(client: rs.SignalClient, run: rs.SignalRun, tmp_path: Path) -> None:
    ids = run.tokenize("Hello", add_special_tokens=False).token_ids[0]
    assert run.detokenize(ids).text == "Hello"
    assert run.tokenizer_info().vocab_size == run.model_info().vocab_size
    prompt = run.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    sampled = run.sample([prompt.token_ids], max_tokens=4, n=2, logprobs=True, seed=3)
    assert len(sampled.samples[0]) == 2
    row = sampled.prompt_token_ids[0] + sampled.samples[0][0].token_ids
    assert run.forward_backward([{"tokens": row}]).num_tokens == len(row) - 1
    run.optim_step()
    assert [model.name for model in client.models()] == ["tiny"]
    assert client.download_tokenizer("tiny", tmp_path).joinpath("tokenizer.json").is_file()


def test_another_user_sees_nothing(stack: RunningStack, run: rs.SignalRun) -> None:
    with rs.SignalClient(stack.new_user("sdk-stranger"), stack.base_url) as stranger:
        assert list(stranger.list_runs()) == []
        with pytest.raises(rs.NotFoundError):
            stranger.run(run.run_id)
    nobody = rs.SignalClient("sk-signal-wrong", stack.base_url)
    with nobody, pytest.raises(rs.AuthenticationError):
        nobody.models()


def test_runs_are_listed_page_by_page(client: rs.SignalClient, run: rs.SignalRun) -> None:
    everything = [found.run_id for found in client.list_runs(page_size=1)]
    assert everything == [found.run_id for found in client.list_runs()]
    assert [found.run_id for found in client.list_runs(label="suite=sdk")] == [run.run_id]


def test_command(stack: RunningStack, run: rs.SignalRun) -> None:
    env = {"SIGNAL_BASE_URL": stack.base_url, "SIGNAL_API_KEY": stack.api_key}
    shown = stacks.attempt("runs", "show", run.run_id, "--json", env=env)
    assert json.loads(shown.stdout)["run_id"] == run.run_id
    assert "tiny" in stacks.attempt("models", env=env).stdout
    assert stacks.attempt("runs", "show", "run_unknown", env=env).returncode == 4
    assert stacks.attempt("models", env=env | {"SIGNAL_API_KEY": "sk-wrong"}).returncode == 3
