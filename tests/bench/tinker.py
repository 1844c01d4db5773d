"""The official Tinker SDK as the client, on the tiny model: `python -m tests.bench.tinker`, JSON on stdout.

The figures are those that another open server was measured by: one sequence of 32 tokens, rank 8.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tinker
from tinker import types

from tests.bench.timing import at_rest, milliseconds, percentiles, running, say
from tests.bench.tiny import in_process
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

IDS = list(range(4, 37))
STEP = types.AdamParams(learning_rate=1e-4)
MODEL = "tiny/model"
BURSTS = 5


def datum(ids: list[int], **arrays: list[float]) -> types.Datum:
    """Tokens that predict the next ones, with numbers of the loss."""
    count = len(ids) - 1
    targets = types.TensorData(data=ids[1:], dtype="int64", shape=[count])
    numbers = {
        name: types.TensorData(data=values, dtype="float32", shape=[count])
        for name, values in arrays.items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": targets, **numbers},
    )


DATA = [datum(IDS, weights=[1.0] * 32)]
PROMPT = types.ModelInput.from_ints(IDS[:8])


def service_of(stack: RunningStack) -> tinker.ServiceClient:
    """A client of the stack."""
    return tinker.ServiceClient(base_url=stack.base_url, api_key=f"tml-{stack.api_key}")


def new_model(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A model that has taken a step."""
    made = service.create_lora_training_client(base_model=MODEL, rank=8, seed=0).result()
    pair(made)
    return made


def pair(model: tinker.TrainingClient) -> None:
    """A loss and a step, submitted together."""
    loss, step = model.forward_backward(DATA, "cross_entropy"), model.optim_step(STEP)
    loss.result()
    step.result()


def pipelined(model: tinker.TrainingClient, pairs: int = 50) -> None:
    """Many pairs, submitted before the first answer is waited for."""
    futures = []
    for _ in range(pairs):
        futures.append(model.forward_backward(DATA, "cross_entropy"))
        futures.append(model.optim_step(STEP))
    for future in futures:
        future.result()


def sampling(tokens: int = 16) -> types.SamplingParams:
    """So many tokens, whatever they are."""
    return types.SamplingParams(max_tokens=tokens, stop=[])


def rl_iteration(model: tinker.TrainingClient) -> None:
    """Live weights, four prompts with four samples each, importance sampling, a step."""
    sampler = model.save_weights_and_get_sampling_client().result()
    answers = [sampler.sample(PROMPT, 4, sampling()) for _ in range(4)]
    data = []
    for answer in answers:
        for sequence in answer.result().sequences:
            ids = [*IDS[:8], *sequence.tokens]
            given = [0.0] * 7
            logprobs = [*given, *(sequence.logprobs or [])]
            data.append(datum(ids, logprobs=logprobs, advantages=[*given, *[0.5] * 16]))
    loss, step = model.forward_backward(data, "importance_sampling"), model.optim_step(STEP)
    loss.result()
    step.result()


def fresh(service: tinker.ServiceClient) -> None:
    """A new model, and its first answer."""
    model = service.create_lora_training_client(base_model=MODEL, rank=8).result()
    model.forward(DATA, "cross_entropy").result()


def restored(service: tinker.ServiceClient, path: str) -> None:
    """A model that goes on from a saved state, and its first answer."""
    model = service.create_training_client_from_state_with_optimizer(path).result()
    model.forward(DATA, "cross_entropy").result()


def lives(
    stack: RunningStack, work: Callable[[tinker.ServiceClient], None], times: int = 5
) -> dict[str, float]:
    """Milliseconds of `work`, each time by a client that goes afterwards."""
    found = []
    for _ in range(times):
        service = service_of(stack)
        service.get_server_capabilities()
        started = time.perf_counter()
        work(service)
        found.append((time.perf_counter() - started) * 1e3)
        service.close("success").result()
    return percentiles(found)


def per_second(count: int, work: Callable[[], object], times: int = BURSTS) -> dict[str, float]:
    """So many of something per second, by repeats."""
    speeds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        speeds.append(count / (time.perf_counter() - started))
    return percentiles(speeds)


def four_together(stack: RunningStack) -> dict[str, float]:
    """Pairs per second of four clients, each with a model of its own, each pipelining 25."""
    models = [new_model(service_of(stack)) for _ in range(4)]
    at_rest(stack)

    def all_of_them() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda model: pipelined(model, 25), models))

    return per_second(100, all_of_them)


def measure(stack: RunningStack) -> dict[str, Any]:
    """All figures of one stack."""
    service = service_of(stack)
    model = new_model(service)
    for _ in range(20):
        pair(model)
    at_rest(stack)
    say("  latencies")
    names = iter(range(1000))
    sampler = model.save_weights_and_get_sampling_client().result()

    def many() -> object:
        return sampler.sample(PROMPT, 16, sampling()).result()

    def at_once() -> object:
        return [one.result() for one in [sampler.sample(PROMPT, 1, sampling()) for _ in range(16)]]

    saved = model.save_state("first").result().path
    # For the step before the first that is measured.
    model.forward_backward(DATA, "cross_entropy").result()
    found: dict[str, Any] = {
        "forward_backward_ms": milliseconds(
            lambda: model.forward_backward(DATA, "cross_entropy").result(),
            60,
            before=lambda: model.optim_step(STEP).result(),
        ),
        "optim_step_ms": milliseconds(
            lambda: model.optim_step(STEP).result(),
            60,
            before=lambda: model.forward_backward(DATA, "cross_entropy").result(),
        ),
        "both_together_ms": milliseconds(lambda: pair(model), 60),
        "sample_1x16_ms": milliseconds(lambda: sampler.sample(PROMPT, 1, sampling()).result(), 30),
        "save_state_ms": milliseconds(lambda: model.save_state(f"s{next(names)}").result(), 15),
        "save_weights_for_sampler_ms": milliseconds(
            lambda: model.save_weights_for_sampler(f"w{next(names)}").result(), 15
        ),
        "rl_iteration_ms": milliseconds(lambda: rl_iteration(model), 15),
        "create_client_ms": lives(stack, lambda own: fresh(own)),
        "restore_with_optimizer_ms": lives(stack, lambda own: restored(own, saved)),
    }
    at_rest(stack)
    say("  throughput")
    found |= {
        "pipelined_50_pairs_per_s": per_second(50, lambda: pipelined(model)),
        "num_samples_16_tokens_per_s": per_second(256, many, 10),
        "requests_16_tokens_per_s": per_second(256, at_once, 10),
        "four_clients_pairs_per_s": four_together(stack),
    }
    service.close("success").result()
    return found


def main() -> None:
    """Measure with both kinds of doorbells."""
    warnings.simplefilter("ignore")
    os.environ["TINKER_TELEMETRY"] = "0"
    found: dict[str, Any] = {"tinker": tinker.__version__}
    with tempfile.TemporaryDirectory(prefix="signal-bench-") as folder:
        tiny = make_tiny_model(Path(folder) / "tiny")
        # How fast this machine is just now.
        found["in_process"] = in_process(tiny)
        for doorbell in ("each", "coalesced"):
            with running(MODEL, tiny, "cpu:1x1", SIGNAL_DOORBELL=doorbell) as (stack, _):
                found[f"doorbell_{doorbell}"] = measure(stack)
        found["in_process_again"] = in_process(tiny)
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
