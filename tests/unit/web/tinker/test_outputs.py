"""Results are what the SDK's own code reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)

from schemas.errors import ERRORS, SignalError
from web.tinker.errors import status_of
from web.tinker.outputs import failure, loss_output, sample_output, step_output


def loss_result(*rows: Any, **metrics: float) -> dict[str, Any]:
    return {
        "loss_sum": 2.5,
        "rows": [{"example": at, "logprobs": row} for at, row in enumerate(rows)],
        "metrics": metrics,
    }


def test_a_loss_with_its_log_probabilities() -> None:
    found = deserialize_forward_backward_output(
        loss_output(loss_result([-0.5, -1.5], [-0.25], ratio=1.5, input_tokens=3.0))
    )
    assert found.metrics == {"loss:sum": 2.5, "ratio:mean": 1.5, "input_tokens:sum": 3.0}
    first, second = (one["logprobs"] for one in found.loss_fn_outputs)
    assert (first.data, first.shape, first.dtype) == ([-0.5, -1.5], [2], "float32")
    assert (second.data, second.shape) == ([-0.25], [1])


def test_several_targets_per_position_keep_their_shape() -> None:
    body = loss_output(loss_result([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], [[-7.0, -8.0]]))
    first, second = (
        one["logprobs"] for one in deserialize_forward_backward_output(body).loss_fn_outputs
    )
    assert (first.data, first.shape) == ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [3, 2])
    assert (second.data, second.shape) == ([-7.0, -8.0], [1, 2])


def sampled(**changes: Any) -> dict[str, Any]:
    sample = {
        "token_ids": [5, 6],
        "logprobs": [-0.5, -0.25],
        "finish_reason": "stop",
        "top_token_ids": None,
        "top_logprobs": None,
    }
    other = {**sample, "token_ids": [7], "logprobs": [-1.0], "finish_reason": "length"}
    empty = dict.fromkeys(("prompt_logprobs", "prompt_top_token_ids", "prompt_top_logprobs"))
    return {"samples": [[sample, other]], **empty, **changes}


def test_samples() -> None:
    found = deserialize_sample_response(sample_output(sampled()))
    assert [one.stop_reason for one in found.sequences] == ["stop", "length"]
    assert [list(one.tokens) for one in found.sequences] == [[5, 6], [7]]
    assert list(found.sequences[0].logprobs or []) == [-0.5, -0.25]
    assert found.prompt_logprobs is None and found.topk_prompt_logprobs is None


def test_scores_of_the_prompt_begin_with_none() -> None:
    result = sampled(
        prompt_logprobs=[[None, -1.0, -2.0]],
        prompt_top_token_ids=[[None, [4, 5], [6, 7]]],
        prompt_top_logprobs=[[None, [-0.5, -1.0], [-0.25, -3.0]]],
    )
    found = deserialize_sample_response(sample_output(result))
    assert found.prompt_logprobs == [None, -1.0, -2.0]
    top = found.topk_prompt_logprobs
    assert top is not None
    assert top[0] is None and top[1] == [(4, -0.5), (5, -1.0)]


def test_only_the_last_tokens_are_scored_where_asked_for() -> None:
    result = sampled(prompt_logprobs=[[None, -1.0, -2.0, -3.0]])
    found = deserialize_sample_response(sample_output(result, last_n=2))
    assert found.prompt_logprobs_np is not None
    assert [math.isnan(value) for value in found.prompt_logprobs_np] == [True, True, False, False]


def test_likeliest_tokens_of_each_sampled_place() -> None:
    result = sampled()
    result["samples"][0][0] |= {
        "top_token_ids": [[5, 9], [6, 8]],
        "top_logprobs": [[-0.5, -2.0], [-0.25, -4.0]],
    }
    found = deserialize_sample_response(sample_output(result)).sequences[0]
    assert found.topk_logprobs_np is not None
    assert np.array_equal(found.topk_logprobs_np.token_ids, [[5, 9], [6, 8]])


def test_a_step() -> None:
    result = {"grad_norm": 1.5, "learning_rate": 0.1, "metrics": {}, "step": 3}
    assert step_output(result) == {"metrics": {"grad_norm": 1.5, "learning_rate": 0.1}}


def test_failures_say_whose_fault_they_are() -> None:
    own = SignalError("token_out_of_range", "No.", param="data.0").to_dict()
    assert failure(own) == {
        "error": "data.0: No. (token_out_of_range)",
        "category": "user",
        "code": "token_out_of_range",
    }
    assert failure(SignalError("worker_lost").to_dict())["category"] == "server"


@pytest.mark.parametrize("code", list(ERRORS))
def test_no_stable_error_has_a_status_that_the_sdk_repeats(code: str) -> None:
    status = status_of(SignalError(code))
    repeated = status in (408, 409, 429) or status >= 500
    assert repeated == ERRORS[code].retryable
