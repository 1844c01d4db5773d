"""Every loss through the whole stack, rows of every form, and bad batches that change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from schemas.losses import BUILT_IN
from tests.support.api import Api, Run, error_of
from tests.support.stack import RunningStack

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PAIRS = [
    {"prompt": CHAT, "chosen": "Paris.", "rejected": "I do not know."},
    {"prompt": "The capital of France is", "chosen": " Paris", "rejected": " happy, happy"},
    {"prompt": [5, 6, 7], "chosen": [8, 9], "rejected": [10]},
]
TOKENS = [
    {
        "tokens": [5, 6, 7, 8],
        "targets": [6, 7, 8, 9],
        "logprobs": [0, -6.0, -5.5, -6.5],
        "advantages": [0, 1.0, 1.0, -0.5],
    },
    {"tokens": [4, 5], "targets": [5, 6], "logprobs": [0, -6], "advantages": [0, -1]},
]
GROUPS = [
    {
        "prompt": CHAT,
        "responses": [
            {"tokens": [8, 9, 2], "logprobs": [-6, -6, -6], "reward": 1.0},
            {"tokens": [10, 2], "logprobs": [-6, -5], "reward": 0.0},
        ],
    }
]
LABELLED = [
    {"prompt": CHAT, "response": "Paris.", "label": True},
    {"prompt": "Once upon", "response": " a night", "label": False},
]
REWARDED = [{"prompt": CHAT, "response": [8, 9, 2], "logprobs": [-6, -6, -6], "reward": 1.5}]
BATCHES: dict[str, list[list[dict[str, Any]]]] = {
    name: [PAIRS] for name in ("dpo", "ipo", "simpo", "orpo", "reward_modeling")
}
BATCHES |= {
    name: [TOKENS, GROUPS, REWARDED]
    for name in ("importance_sampling", "ppo", "cispo", "dro", "conservative_ppo")
}
BATCHES |= {"grpo": [TOKENS, GROUPS], "gspo": [TOKENS, GROUPS], "kto": [LABELLED]}
BATCHES["custom"] = [[{"tokens": [5, 6], "targets": [6, 7], "weights": [0.5, -1]}]]
BATCHES["causal_lm"] = BATCHES["cross_entropy"] = [
    [{"text": "one, two"}, {"messages": [*CHAT, {"role": "assistant", "content": "Paris."}]}],
    [{"tokens": [5, 6], "targets": [[6, 7], [8, 9]], "weights": [[0.5, 0.5], [1, 0]]}],
]


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[Api]:
    with Api(stack, stack.new_user("losses")) as found:
        yield found


@pytest.fixture(scope="module")
def run(api: Api) -> Iterator[Run]:
    with api.run() as found:
        yield found


@pytest.mark.parametrize("loss", BUILT_IN)
def test_every_loss_trains(run: Run, loss: str) -> None:
    for batch in BATCHES[loss]:
        body = {"batch_data": batch, "loss_fn": loss, "accumulate": False}
        found = run.ok("/forward_backward", body)
        assert math.isfinite(found["loss"])
        assert found["grad_norm"] >= 0
        assert set(found["metrics"]) <= {*BUILT_IN[loss].metrics, "input_tokens"}
        assert run.ok("/optim_step", {"learning_rate": 1e-3})["grad_norm"] == pytest.approx(
            found["grad_norm"]
        )


def test_dpo_learns_a_preference(api: Api) -> None:
    body = {"batch_data": PAIRS, "loss_fn": "dpo"}
    with api.run(seed=1) as run:
        first = run.ok("/forward_backward", body)
        # A new adapter is the reference.
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
        for _ in range(10):
            run.ok("/optim_step", {"learning_rate": 2e-2})
            last = run.ok("/forward_backward", body)
    assert last["loss"] < 0.5
    assert last["metrics"]["rewards/accuracies"] == 1.0


def test_the_largest_batch_of_options(run: Run) -> None:
    options = {"loss_type": "dr_grpo", "max_completion_length": 8, "beta": 0.1, "delta": 2}
    body = {"batch_data": GROUPS, "loss_fn": "grpo", "loss_kwargs": options, "accumulate": False}
    found = run.ok("/forward_backward", body)
    assert found["metrics"]["kl"] >= 0
    assert found["metrics"]["reward"] == 0.5
    run.ok("/optim_step")


def test_forward_and_a_loss_of_ones_own(stack: RunningStack) -> None:
    with rs.SignalClient(stack.new_user("custom"), stack.base_url) as client:
        run = client.create_run("tiny", lora_r=4)
        rows = run.forward(PAIRS, top_k=3).rows
        assert [row.example for row in rows] == [0, 0, 1, 1, 2, 2]
        assert [one is None for one in rows[4].logprobs] == [True, True, False, False]
        assert len(rows[4].top_token_ids[3]) == 3
        every = run.forward([{"tokens": [5, 6, 7]}], prompt_logprobs=True).rows[0].logprobs
        assert [one is None for one in every] == [False, False, True]

        def nll(given: Any) -> tuple[float, list[list[float]]]:
            own = [[one or 0.0 for one in row.logprobs] for row in given]
            return -sum(map(sum, own)), [[-1.0] * len(row) for row in own]

        batch = [{"text": "one, two, three"}, {"tokens": [5, 6, 7]}]
        custom = run.forward_backward_custom(batch, nll, accumulate=False)
        known = run.forward_backward(batch, "cross_entropy", accumulate=False)
        assert custom.loss == pytest.approx(known.loss_sum, rel=1e-5)
        assert custom.grad_norm == pytest.approx(known.grad_norm, rel=1e-6)
        run.cancel()


@pytest.mark.parametrize(
    ("body", "params"),
    [
        ({"batch_data": PAIRS, "loss_fn": "grpo"}, ["batch_data.0.chosen", "batch_data.1.chosen",
                                                    "batch_data.2.chosen"]),
        ({"batch_data": [*TOKENS[:1], {"tokens": [1, 2]}], "loss_fn": "ppo"},
         ["batch_data.1.logprobs", "batch_data.1.advantages"]),
        ({"batch_data": [{"prompt": "a", "responses": []}], "loss_fn": "grpo"},
         ["batch_data.0.responses"]),
        ({"batch_data": [{"prompt": "a", "responses": [{"text": "b", "reward": 1}]}],
          "loss_fn": "grpo"}, ["batch_data.0.responses"]),
        ({"batch_data": [{"tokens": [1, 2], "logprobs": [1.0]}], "loss_fn": "ppo"},
         ["batch_data.0.logprobs"]),
        ({"batch_data": PAIRS, "loss_fn": "dpo", "loss_kwargs": {"epsilon": 0.2, "beta": -1}},
         ["loss_kwargs.epsilon", "loss_kwargs.beta"]),
        ({"batch_data": [{"prompt": "a", "chosen": "b"}], "loss_fn": "dpo"},
         ["batch_data.0.rejected"]),
        ({"batch_data": [{"prompt": "a", "response": "b"}], "loss_fn": "kto"},
         ["batch_data.0.reward"]),
        ({"batch_data": LABELLED[:1], "loss_fn": "kto"}, ["batch_data"]),
    ],
)  # fmt: skip
def test_a_bad_batch_is_named_and_changes_nothing(
    run: Run, body: dict[str, Any], params: list[str]
) -> None:
    before = run.get("/session_state").json()["next_seq"]
    error = error_of(run.post("/forward_backward", body), 422, "validation_error")
    assert [detail["param"] for detail in error["details"]] == params
    assert run.get("/session_state").json()["next_seq"] == before


def test_equal_rewards_are_allowed_and_said(run: Run) -> None:
    group = {"prompt": CHAT, "responses": [{"text": "b", "reward": 1}] * 3}
    body = {"batch_data": [group], "loss_fn": "grpo", "accumulate": False}
    found = run.ok("/forward_backward", body)
    assert found["grad_norm"] == 0.0
    assert found["metrics"]["frac_reward_zero_std"] == 1.0


def test_reductions_do_not_mix(run: Run) -> None:
    run.ok("/forward_backward", {"batch_data": PAIRS, "loss_fn": "dpo", "accumulate": False})
    error_of(
        run.post("/forward_backward", {"batch_data": TOKENS, "loss_fn": "ppo"}),
        409,
        "mixed_reductions",
    )
    assert run.ok("/optim_step")["grad_norm"] > 0
