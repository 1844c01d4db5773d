"""Records: the generated file is current, and answers of other versions are read."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import get_type_hints

import pytest

from client_lib import generate
from rewardsignal import _schemas as records
from rewardsignal._records import Record
from schemas.operations import OptimStepRequest
from schemas.runs import RunCreate
from schemas.sampling import SampleRequest

RAW = {
    "seq": 4,
    "step": 1,
    "loss": 2.5,
    "loss_sum": 10.0,
    "divisor": 4.0,
    "num_tokens": 4,
    "grad_norm": 0.5,
    "accumulated_grad_norm": 0.5,
    "accumulated_calls": 1,
    "metrics": {"a": 1.0},
    "metric_counts": {"a": 2.0},
    "rows": None,
    "timings": {"queued_ms": 1.0, "execute_ms": 2.0, "woken_ms": 0.1},
    "perplexity": 12.2,
}


def test_generated_file_is_current() -> None:
    assert generate.TARGET.read_text(encoding="utf-8") == generate.render()


def test_every_answer_has_its_record() -> None:
    for schema in generate.answers():
        record = getattr(records, schema.__name__)
        assert set(get_type_hints(record)) >= set(schema._declared_fields)


@pytest.mark.parametrize(
    ("options", "schema", "explicit"),
    [
        (records.RunOptions, RunCreate, {"base_model", "name", "labels", "init_from"}),
        (records.OptimStepOptions, OptimStepRequest, {"learning_rate", "lane", "client_seq"}),
        (records.SampleOptions, SampleRequest, {"prompts", "first_row", "lane", "client_seq"}),
    ],
)
def test_options_are_the_requests_fields(options: type, schema: type, explicit: set[str]) -> None:
    assert set(options.__annotations__) | explicit == set(schema._declared_fields)  # type: ignore[attr-defined]


def test_attributes_and_keys_are_the_same() -> None:
    result = records.ForwardBackwardResult.from_dict(RAW)
    assert result.loss == result["loss"] == 2.5
    assert result.timings.execute_ms == result["timings"]["execute_ms"] == 2.0
    assert dict(result)["metrics"] == {"a": 1.0}


def test_unknown_fields_are_kept() -> None:
    result = records.ForwardBackwardResult.from_dict(RAW)
    assert result["perplexity"] == 12.2
    assert result["timings"]["woken_ms"] == 0.1
    assert result.to_dict() == RAW


def test_missing_fields_are_none() -> None:
    assert records.ForwardBackwardResult.from_dict({"loss": 1.0}).grad_norm is None


def test_absent_optional_fields_are_no_keys() -> None:
    sample = {"text": "a", "token_ids": [1], "logprobs": None, "finish_reason": "stop"}
    result = records.SampleResult.from_dict({"samples": [[sample]], "seq": 1})
    assert result.outputs is None
    assert "outputs" not in result
    with pytest.raises(KeyError):
        result["outputs"]
    assert result.samples[0][0].text == "a"


def test_a_record_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        records.ForwardBackwardResult.from_dict(RAW).loss = 0.0  # type: ignore[misc]


def test_equality_pickle_and_repr() -> None:
    result = records.ForwardBackwardResult.from_dict(RAW)
    again: Record = pickle.loads(pickle.dumps(result))
    assert again == result
    assert again["perplexity"] == 12.2
    assert repr(result).startswith("ForwardBackwardResult(seq=4, step=1, loss=2.5")
    assert "perplexity" not in repr(result)
