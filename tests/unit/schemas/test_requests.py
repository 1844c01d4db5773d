"""Request schemas: what is refused, and under which name."""

from __future__ import annotations

from typing import Any

import pytest
from marshmallow import ValidationError

from schemas.catalogue import DetokenizeRequest, TokenizeRequest
from schemas.metrics import MetricsPost
from schemas.operations import REQUESTS, ForwardBackwardRequest, OptimStepRequest
from schemas.runs import RunConfig, RunCreate, resolved
from schemas.sampling import SampleRequest

NAN, INF = float("nan"), float("inf")


def wrong(schema: Any, data: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(ValidationError) as error:
        schema().load(data)
    return dict(error.value.messages)  # type: ignore[arg-type]


def row(**fields: Any) -> dict[str, Any]:
    return {"batch_data": [fields]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"text": ""}, "text"),
        ({"text": "  \n"}, "text"),
        ({"text": "x" * 32_769}, "text"),
        ({"text": "a", "tokens": [1]}, "tokens"),
        ({}, "text"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 51}, "messages"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": [1.0]}, "tokens"),
        ({"tokens": [True]}, "tokens"),
        ({"tokens": [2**31]}, "tokens"),
        ({"tokens": "12"}, "tokens"),
        ({"tokens": [1, 2], "targets": [1]}, "targets"),
        ({"tokens": [1, 2], "weights": [1.0]}, "weights"),
        ({"tokens": [1, 2], "weights": [1.0, NAN]}, "weights"),
        ({"tokens": [1, 2], "weights": [1.0, INF]}, "weights"),
        ({"tokens": [1, 2], "weights": [1.0, 1e39]}, "weights"),
        ({"text": "a", "weights": [1.0]}, "weights"),
        ({"text": "a", "colour": 1}, "colour"),
    ],
)
def test_a_bad_row_is_named(fields: dict[str, Any], path: str) -> None:
    assert path in wrong(ForwardBackwardRequest, row(**fields))["batch_data"][0]


def test_all_wrong_fields_are_named_at_once() -> None:
    messages = wrong(
        ForwardBackwardRequest,
        {"batch_data": [{"tokens": [1, -5]}, {"text": ""}], "accumulate": 1, "x": 0},
    )
    assert set(messages) == {"batch_data", "accumulate", "x"}
    assert set(messages["batch_data"]) == {0, 1}
    assert 1 in messages["batch_data"][0]["tokens"]


def test_batch_bounds() -> None:
    assert "batch_data" in wrong(ForwardBackwardRequest, {"batch_data": []})
    assert "batch_data" in wrong(ForwardBackwardRequest, {"batch_data": [{"text": "a"}] * 129})
    assert (
        len(ForwardBackwardRequest().load({"batch_data": [{"text": "a"}] * 128})["batch_data"])
        == 128
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": -1e-4},
        {"learning_rate": 1.5},
        {"learning_rate": NAN},
        {"learning_rate": "1e-4"},
        {"learning_rate": True},
        {"learning_rate": 10**400},
        {"beta1": 1.0},
        {"eps": INF},
        {"grad_clip_norm": -1},
        {"on_error": "ignore"},
        {"on_error": None},
    ],
)
def test_optimizer_parameters_are_bounded(fields: dict[str, Any]) -> None:
    assert set(wrong(OptimStepRequest, fields)) == set(fields)


@pytest.mark.parametrize("schema", REQUESTS.values())
def test_lane_and_client_seq_go_together(schema: Any) -> None:
    assert "client_seq" in wrong(schema, {"lane": "a"})
    assert "lane" in wrong(schema, {"client_seq": 1})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": ["a", [1]]}, "prompts"),
        ({"prompts": [[]]}, "prompts"),
        ({"prompts": [{}]}, "prompts"),
        ({"prompts": [[1, 2.5]]}, "prompts"),
        ({"prompts": [[{"role": "user"}]]}, "prompts"),
        ({"prompts": ["a"] * 129}, "prompts"),
        ({"prompts": ["a"], "n": 0}, "n"),
        ({"prompts": ["a"] * 128, "n": 128}, "n"),
        ({"prompts": ["a"], "temperature": -1}, "temperature"),
        ({"prompts": ["a"], "top_p": 0}, "top_p"),
        ({"prompts": ["a"], "top_k": -2}, "top_k"),
        ({"prompts": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"prompts": ["a"], "seed": 1.5}, "seed"),
        ({"prompts": ["a"], "stop": [1, "x"]}, "stop"),
        ({"prompts": ["a"], "stop": [""]}, "stop"),
        ({"prompts": ["a"], "stop": ["x"] * 17}, "stop"),
    ],
)
def test_sampling_parameters_are_bounded(fields: dict[str, Any], name: str) -> None:
    assert set(wrong(SampleRequest, fields)) == {name}


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.6},
        {"optimizer": "adam"},
        {"warmup_steps": 5},
        {"total_steps": 5},
        {"lora_rank_pattern": {"q_.*": 4}},
        {"lora_alpha_pattern": {"q_proj": 0}},
        {"quantization": "fp4"},
        {"train_attn": 1},
        {"gpu_config": "H100:1"},
        {"lora_r": -1},
        {"lora_r": 513},
        {"learning_rate": 0},
        {"lora_target_modules": []},
        {"lora_target_modules": ["conv"]},
        {"seed": -1},
        {"bf16": "yes"},
        {"unknown": 1},
    ],
)
def test_a_run_setting_that_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any]) -> None:
    assert set(wrong(RunCreate, {"base_model": "m", **fields})) == set(fields)


def test_a_resolved_configuration_has_every_default() -> None:
    config = resolved(RunCreate().load({"base_model": "m", "name": "x"}), context_length=512)
    assert config["max_seq_length"] == 512 and config["lora_alpha"] == 32.0
    assert set(config) == set(RunConfig().fields)


@pytest.mark.parametrize(
    "metrics", [{}, {"a": NAN}, {"a": True}, {"a b": 1}, {"a": "1"}, {"a": 10**400}, [1]]
)
def test_own_metrics_are_finite_numbers_with_names(metrics: Any) -> None:
    assert "metrics" in wrong(MetricsPost, {"metrics": metrics})


def test_texts_and_ids_to_tokenize() -> None:
    assert "text" in wrong(TokenizeRequest, {"text": []})
    assert "text" in wrong(TokenizeRequest, {"text": ["a", 1]})
    assert "token_ids" in wrong(DetokenizeRequest, {"token_ids": [[1], ["a"]]})
    assert "token_ids" in wrong(DetokenizeRequest, {"token_ids": [-1]})
    assert DetokenizeRequest().load({"token_ids": []})["token_ids"] == []
