"""Forms to rows, and batches that a loss does not take."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import SignalError
from schemas.examples import TrainingExample
from schemas.losses import find_loss
from workers.text.batches import compile_batch, compile_forward
from workers.text.rows import Row
from workers.text.tokenizer import Tokenizer

ROW = {"tokens": [5, 6, 7], "targets": [6, 7, 8]}
PAIR = {"prompt": [5, 6], "chosen": [7, 8, 9], "rejected": [10]}
GROUP = {
    "prompt": [5, 6],
    "responses": [
        {"tokens": [7, 8], "reward": 1.0, "logprobs": [-1.0, -2.0]},
        {"tokens": [9], "reward": 0.0, "logprobs": [-3.0]},
    ],
}
ANSWER = {"prompt": [5, 6], "response": [7, 8], "reward": 2.0, "logprobs": [-1.0, -2.0]}
LIKED, DISLIKED = (
    {"prompt": [5, 6, 7], "response": [8, 9, 10], "label": True},
    {"prompt": [11, 12], "response": [13], "label": False},
)


def rows(
    tokenizer: Tokenizer, examples: list[Any], loss: str, max_length: int = 64, **options: Any
) -> list[Row]:
    loaded = [TrainingExample().load(example) for example in examples]
    return compile_batch(
        loaded,
        tokenizer,
        max_length=max_length,
        vocab_size=400,
        loss=find_loss(loss),
        options=options,
        max_group=3,
    )


def wrong(tokenizer: Tokenizer, examples: list[Any], loss: str, **options: Any) -> list[Any]:
    with pytest.raises(SignalError) as caught:
        rows(tokenizer, examples, loss, **options)
    return [(detail.param, detail.code) for detail in caught.value.details]


def lists(row: Row) -> tuple[list[int], list[int], list[float]]:
    return list(row.tokens), list(row.targets), list(row.weights)


def test_a_preference_is_two_rows(tiny: Tokenizer) -> None:
    example = {**PAIR, "margin": 0.5, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    chosen, rejected = rows(tiny, [example], "reward_modeling")
    assert lists(chosen) == ([5, 6, 7, 8], [6, 7, 8, 9], [0.0, 1.0, 1.0, 1.0])
    assert lists(rejected) == ([5, 6], [6, 10], [0.0, 1.0])
    assert chosen.values == {"chosen": 1.0, "margin": 0.5, "ref_logps": -3.0}
    assert rejected.values == {"chosen": 0.0, "margin": 0.5, "ref_logps": -4.0}
    assert (chosen.example, rejected.example) == (0, 0)


def test_a_group_is_a_row_per_response(tiny: Tokenizer) -> None:
    first, second = rows(tiny, [GROUP], "grpo", scale_rewards="none")
    assert lists(first) == ([5, 6, 7], [6, 7, 8], [0.0, 1.0, 1.0])
    assert list(first.arrays["advantages"]) == [0.0, 0.5, 0.5]
    assert list(first.arrays["logprobs"]) == [0.0, -1.0, -2.0]
    assert list(second.arrays["advantages"]) == [0.0, -0.5]
    assert (first.values, second.values) == (
        {"reward": 1.0, "zero_std": 0.0},
        {"reward": 0.0, "zero_std": 0.0},
    )


def test_equal_rewards_are_said(tiny: Tokenizer) -> None:
    equal = {"prompt": "a", "responses": [{"text": "b", "reward": 0.1}] * 3}
    for row in rows(tiny, [equal], "grpo"):
        assert not any(row.arrays["advantages"])
        assert row.values["zero_std"] == 1.0


def test_a_response_is_credited_with_its_reward(tiny: Tokenizer) -> None:
    (row,) = rows(tiny, [ANSWER], "importance_sampling")
    assert list(row.arrays["advantages"]) == [0.0, 2.0, 2.0]
    (row,) = rows(tiny, [{**ANSWER, "values": [1.0, 0.5]}], "ppo", gamma=0.5, lam=0.5)
    # The last: 2 - 0.5; before it: 0.5 * 0.5 - 1 + 0.25 * 1.5.
    assert list(row.arrays["advantages"]) == [0.0, -0.375, 1.5]
    assert list(row.arrays["returns"]) == [0.0, 0.625, 2.0]
    assert list(row.arrays["values"]) == [0.0, 1.0, 0.5]


def test_labelled_rows_come_with_mismatched_ones(tiny: Tokenizer) -> None:
    liked, disliked, *others = rows(tiny, [LIKED, DISLIKED], "kto", max_length=7)
    assert (liked.values, disliked.values) == ({"label": 1.0}, {"label": 0.0})
    assert [row.trained for row in others] == [False, False]
    # Each prompt with the response of the row before it.
    assert lists(others[0]) == ([5, 6, 7], [6, 7, 13], [0.0, 0.0, 1.0])
    assert lists(others[1]) == ([11, 12, 8, 9], [12, 8, 9, 10], [0.0, 1.0, 1.0, 1.0])
    short = [LIKED, {**DISLIKED, "prompt": [11] * 5}]
    assert list(rows(tiny, short, "kto", max_length=6)[3].targets) == [11, 11, 11, 11, 8]


def test_several_targets_per_position(tiny: Tokenizer) -> None:
    wide = {"tokens": [5, 6], "targets": [[7, 8], [9, 10]], "weights": [[0.5, 0.5], [1, 0]]}
    (row,) = rows(tiny, [wide], "cross_entropy")
    assert (row.width, list(row.targets), list(row.weights)) == (
        2,
        [7, 8, 9, 10],
        [0.5, 0.5, 1.0, 0.0],
    )


def test_positions_that_were_not_sampled_do_not_count(tiny: Tokenizer) -> None:
    given = {**ROW, "logprobs": [0.0, -1.0, 0.0], "advantages": [0.0, 0.0, 2.0]}
    (row,) = rows(tiny, [given], "importance_sampling")
    assert list(row.weights) == [0.0, 1.0, 1.0]


def test_a_custom_gradient_may_be_nothing(tiny: Tokenizer) -> None:
    assert not any(rows(tiny, [{**ROW, "weights": [0, 0, 0]}], "custom")[0].weights)
    assert wrong(tiny, [{**ROW, "weights": [0, 0, 0]}], "cross_entropy") == [
        ("batch_data.0.weights", "no_target_tokens")
    ]


@pytest.mark.parametrize(
    ("examples", "loss", "params"),
    [
        ([{"text": "a b"}], "dpo", ["0.text"]),
        ([PAIR, ROW], "dpo", ["1.tokens"]),
        ([ROW, {"text": "one two"}, PAIR], "causal_lm", ["2.chosen"]),
        ([PAIR, GROUP], "grpo", ["0.chosen"]),
        ([ROW], "ppo", ["0.logprobs", "0.advantages"]),
        ([{**ROW, "logprobs": [0, -1, -1]}], "cross_entropy", ["0.logprobs"]),
        ([{**PAIR, "margin": 1.0}], "dpo", ["0.margin"]),
        ([{**PAIR, "ref_chosen_logps": 1.0}], "dpo", ["0.ref_rejected_logps"]),
        ([{**PAIR, "ref_chosen_logps": 1, "ref_rejected_logps": 1}], "simpo",
         ["0.ref_chosen_logps", "0.ref_rejected_logps"]),
        ([PAIR, {**PAIR, "ref_chosen_logps": 1, "ref_rejected_logps": 1}], "dpo",
         ["0.ref_chosen_logps", "0.ref_rejected_logps"]),
        ([{**GROUP, "responses": []}], "grpo", ["0.responses"]),
        ([{**GROUP, "responses": GROUP["responses"][:1]}], "grpo", ["0.responses"]),
        ([{**GROUP, "responses": GROUP["responses"] * 2}], "grpo", ["0.responses"]),
        ([{"prompt": "a", "responses": [{"text": "b", "reward": 1}] * 2}], "ppo",
         ["0.responses.0.logprobs", "0.responses.1.logprobs"]),
        ([{**GROUP, "responses": [GROUP["responses"][0], {"tokens": [1], "reward": 0}]}], "grpo",
         ["0.responses.1.logprobs"]),
        ([ANSWER], "grpo", ["0.response"]),
        ([LIKED], "kto", [""]),
        ([LIKED, ANSWER], "kto", ["1.label", "1.logprobs", "1.reward"]),
        ([{**LIKED, "logprobs": [0, 0, 0]}], "ppo", ["0.reward", "0.label"]),
        ([{**ROW, "advantages": [1, 1, 1], "weights": [1, -1, 0]}], "grpo", ["0.weights.1"]),
        ([{**ROW, "targets": [[1], [2], [3]], "advantages": [1, 1, 1]}], "grpo", ["0.targets"]),
        ([{**ROW, "logprobs": [1, 1, 1], "advantages": [1, 1, 1], "values": [1, 1, 1]}], "ppo",
         ["0.returns"]),
        ([{**PAIR, "chosen": [500], "rejected": [501]}], "dpo", ["0.chosen.0", "0.rejected.0"]),
        ([{**PAIR, "prompt": [500]}], "dpo", ["0.prompt.0"]),
        ([{**PAIR, "chosen": [7] * 63}, {**PAIR, "rejected": "x" * 200}], "dpo",
         ["0.chosen", "1.rejected"]),
    ],
)  # fmt: skip
def test_every_wrong_field_is_named(
    tiny: Tokenizer, examples: list[Any], loss: str, params: list[str]
) -> None:
    expected = [f"batch_data.{param}".rstrip(".") for param in params]
    assert [param for param, _ in wrong(tiny, examples, loss)] == expected


def test_an_option_that_the_rows_leave_without_effect(tiny: Tokenizer) -> None:
    row = {**ROW, "advantages": [0, 1, 1]}
    assert wrong(tiny, [row], "grpo", scale_rewards="batch") == [
        ("loss_kwargs.scale_rewards", "validation_error")
    ]
    assert wrong(tiny, [ANSWER], "ppo", lam=0.5, gamma=0.9)[0][0] == "loss_kwargs.lam"
    # Spelled out, the default is what it was.
    assert rows(tiny, [row], "grpo", scale_rewards="group")


def forward(tokenizer: Tokenizer, examples: list[Any], **options: Any) -> list[Row]:
    loaded = [TrainingExample().load(example) for example in examples]
    return compile_forward(loaded, tokenizer, max_length=64, vocab_size=400, **options)


def test_forward_takes_rows_of_any_loss(tiny: Tokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows_ = forward(tiny, [ROW, PAIR, GROUP, ANSWER, LIKED, chat, {"text": "one two"}])
    assert [row.example for row in rows_] == [0, 1, 1, 2, 2, 3, 4, 5, 6]
    assert not any(row.arrays or row.values for row in rows_)
    assert list(rows_[1].weights) == [0.0, 1.0, 1.0, 1.0]
    every = forward(tiny, [PAIR, {"tokens": [5, 6, 7]}, chat], prompt_logprobs=True)
    assert list(every[0].weights) == [1.0] * 4
    # After the last token of a row without targets nothing is predicted.
    assert list(every[2].weights) == [1.0, 1.0, 0.0]
    assert all(every[3].weights)


def test_forward_counts_what_a_loss_would(tiny: Tokenizer) -> None:
    weighted = {"tokens": [5, 6], "targets": [[7, 8], [9, 10]], "weights": [[-2, 0], [0, 0]]}
    (row,) = forward(tiny, [weighted])
    assert list(row.weights) == [1.0, 0.0, 0.0, 0.0]
    assert list(forward(tiny, [{**ROW, "weights": [0, 0, 0]}])[0].weights) == [0.0] * 3


def test_forward_names_every_wrong_field(tiny: Tokenizer) -> None:
    with pytest.raises(SignalError) as caught:
        forward(tiny, [{"text": "a"}, {"prompt": "a", "responses": []}, {"tokens": [400]}])
    assert [detail.param for detail in caught.value.details] == [
        "batch_data.0.text",
        "batch_data.1.responses",
        "batch_data.2.tokens.0",
    ]
