"""From requests to what a worker gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from marshmallow import Schema

from schemas.errors import SignalError
from schemas.operations import REQUESTS
from schemas.runs import CompleteRequest
from web.history.saved import Saved, check_fits
from web.operations.compile import Target, compile_operation
from web.runs.facts import RunFacts
from workers.model_folder import read_model_folder
from workers.queue.records import NewEntry
from workers.text.rows import unpack_rows

CONFIG = {"max_seq_length": 64, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": None}


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    facts = RunFacts("run_1", "user_1", "tiny", CONFIG)
    return Target(facts, read_model_folder("tiny", tiny_model), saved)


def saved(run_id: str, name: str, path: str) -> Saved:
    """What the run's owner has saved: "mine" of this run and "there" of another."""
    if (run_id, name) not in (("run_1", "mine"), ("run_2", "there"), ("run_2", "bare")):
        raise SignalError("not_found", param=f"{path}artifact")
    mode = "adapter" if name == "bare" else "state"
    manifest = {"base_model": "tiny", "config": CONFIG, "mode": mode, "seq": 4}
    return Saved(run_id, name, f"runs/{run_id}/artifacts/{name}", "5ea1", manifest)


def compiled(target: Target, kind: str, **request: Any) -> NewEntry:
    schema: Schema = CompleteRequest() if kind == "complete" else REQUESTS[kind]()
    return compile_operation(kind, schema.load(request), target)


def body(entry: NewEntry) -> dict[str, Any]:
    return dict(msgpack.unpackb(entry.body))


def refused(target: Target, kind: str, **request: Any) -> SignalError:
    with pytest.raises(SignalError) as caught:
        compiled(target, kind, **request)
    return caught.value


def test_rows_travel_as_arrays(target: Target) -> None:
    entry = compiled(
        target, "forward_backward", batch_data=[{"tokens": [1, 2, 3]}, {"text": "hello"}]
    )
    rows = unpack_rows(body(entry)["rows"])
    assert list(rows[0].targets) == [2, 3, 0]
    assert list(rows[0].weights) == [1.0, 1.0, 0.0]
    assert entry.tokens == len(rows[0]) + len(rows[1])
    assert (body(entry)["loss_fn"], body(entry)["accumulate"]) == ("causal_lm", True)


def test_every_wrong_row_is_named_with_its_own_code(target: Target) -> None:
    rows = [{"tokens": [1] * 65}, {"text": "fine"}, {"tokens": [1, 600]}, {"tokens": [5]}]
    error = refused(target, "forward_backward", batch_data=rows)
    assert [(d.param, d.code) for d in error.details] == [
        ("batch_data.0.tokens", "sequence_too_long"),
        ("batch_data.2.tokens.1", "token_out_of_range"),
        ("batch_data.3.tokens", "no_target_tokens"),
    ]


def test_losses_and_their_options(target: Target) -> None:
    rows = [{"tokens": [1, 2]}]
    unknown = refused(target, "forward_backward", batch_data=rows, loss_fn="magic")
    assert (unknown.code, unknown.param) == ("unknown_loss", "loss_fn")
    option = refused(target, "forward_backward", batch_data=rows, loss_kwargs={"beta": 1})
    assert (option.code, option.param) == ("unknown_option", "loss_kwargs.beta")


def test_options_travel_with_their_defaults(target: Target) -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    entry = compiled(target, "forward_backward", batch_data=rows, loss_fn="dpo")
    assert body(entry)["loss_kwargs"] == {"beta": 0.1, "label_smoothing": 0.0}
    spelled = compiled(
        target, "forward_backward", batch_data=rows, loss_fn="dpo", loss_kwargs={"beta": 0.1}
    )
    assert spelled.digest == entry.digest
    chosen, rejected = unpack_rows(body(entry)["rows"])
    assert (chosen.values, rejected.values) == ({"chosen": 1.0}, {"chosen": 0.0})


def test_wrong_options_and_wrong_rows_are_named_together(target: Target) -> None:
    rows = [{"prompt": "a", "chosen": [600], "rejected": " c"}]
    error = refused(
        target,
        "forward_backward",
        batch_data=rows,
        loss_fn="dpo",
        loss_kwargs={"epsilon": 0.1, "beta": 0},
    )
    assert [(d.param, d.code) for d in error.details] == [
        ("loss_kwargs.epsilon", "unknown_option"),
        ("loss_kwargs.beta", "validation_error"),
        ("batch_data.0.chosen.0", "token_out_of_range"),
    ]


def test_the_largest_group_is_a_setting(target: Target) -> None:
    group = [{"prompt": "a", "responses": [{"text": "b", "reward": 1}] * 5}]
    small = Target(target.facts, target.model, max_group=4)
    assert (
        len(
            unpack_rows(
                body(compiled(target, "forward_backward", batch_data=group, loss_fn="grpo"))["rows"]
            )
        )
        == 5
    )
    error = refused(small, "forward_backward", batch_data=group, loss_fn="grpo")
    assert error.param == "batch_data.0.responses"


def test_a_forward_is_bounded_in_what_it_answers(target: Target) -> None:
    rows = [{"tokens": [1, 2, 3]}, {"text": "hello"}]
    entry = compiled(target, "forward", batch_data=rows, top_k=2, prompt_logprobs=True)
    assert body(entry)["top_k"] == 2
    assert list(unpack_rows(body(entry)["rows"])[0].weights) == [1.0, 1.0, 0.0]
    wide = Target(replace(target.facts, config={"max_seq_length": 10**6}), target.model)
    large = [{"tokens": [1] * 50_000}] * 2
    assert refused(wide, "forward", batch_data=large, top_k=20).param == "top_k"


@pytest.mark.parametrize(
    ("prompts", "code", "param"),
    [
        ([[1] * 256], "sequence_too_long", "prompts.0"),
        ([[1], [512]], "token_out_of_range", "prompts.1.0"),
        (["x " * 600], "sequence_too_long", "prompts.0"),
    ],
)
def test_prompts_that_do_not_fit(target: Target, prompts: list[Any], code: str, param: str) -> None:
    error = refused(target, "sample", prompts=prompts)
    assert (error.details[0].code, error.details[0].param) == (code, param)


@pytest.mark.parametrize(
    ("stop", "texts", "ids"),
    [
        (None, [], [2]),
        ("a", ["a"], []),
        (["a", "b"], ["a", "b"], []),
        ([7, 8], [], [7, 8]),
        ([], [], []),
    ],
)
def test_what_stops_a_sample(target: Target, stop: Any, texts: list[str], ids: list[int]) -> None:
    found = body(compiled(target, "sample", prompts=[[1, 2]], stop=stop))
    assert (found["stop_strings"], found["stop_token_ids"]) == (texts, ids)


def test_an_optimizer_step_carries_what_was_set_and_no_more(target: Target) -> None:
    entry = compiled(target, "optim_step", learning_rate=0.1, lane="a", client_seq=2)
    assert body(entry) == {"learning_rate": 0.1, "on_error": "fail"}
    assert (entry.lane, entry.client_seq, entry.on_error) == ("a", 2, "fail")


def test_the_digest_is_of_the_meaning(target: Target) -> None:
    rows = [{"tokens": [1, 2]}]
    plain = compiled(target, "forward_backward", batch_data=rows)
    spelled = compiled(
        target, "forward_backward", batch_data=rows, loss_fn="causal_lm", accumulate=True
    )
    assert plain.digest == spelled.digest
    others = [
        compiled(target, "forward_backward", batch_data=[{"tokens": [1, 3]}]),
        compiled(target, "forward_backward", batch_data=rows, lane="a", client_seq=1),
        compiled(target, "optim_step"),
        compiled(target, "optim_step", on_error="continue"),
        compiled(target, "save_state"),
        compiled(target, "complete"),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 7


def test_a_saved_state_is_named_by_its_place_and_its_seal(target: Target) -> None:
    mine = body(compiled(target, "load_state", artifact="mine"))
    assert mine == {"key": "runs/run_1/artifacts/mine", "sha256": "5ea1", "optimizer": True}
    there = compiled(target, "load_state", run_id="run_2", artifact="bare", optimizer=False)
    assert body(there)["key"] == "runs/run_2/artifacts/bare"
    assert body(compiled(target, "load_state", run_id="run_1", artifact="mine")) == mine
    assert body(compile_operation("certificate", {}, target)) == {}


def test_a_saved_state_that_cannot_be_loaded_is_refused(target: Target) -> None:
    assert refused(target, "load_state", artifact="there").param == "artifact"
    error = refused(target, "load_state", run_id="run_2", artifact="bare")
    assert (error.code, error.param) == ("state_mismatch", "optimizer")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({}, []),
        ({"lora_r": 8}, ["lora_r"]),
        ({"lora_r": 8, "lora_alpha": 9.0}, ["lora_r", "lora_alpha"]),
        ({"lora_target_modules": ["q_proj"]}, ["lora_target_modules"]),
        ({"max_seq_length": 32, "learning_rate": 1.0}, []),
    ],
)
def test_a_saved_state_must_be_of_the_same_adapter(
    target: Target, change: dict[str, Any], fields: list[str]
) -> None:
    found = saved("run_1", "mine", "")
    every = sorted(target.model.linear_widths)
    same = {**CONFIG, "lora_target_modules": every}
    check_fits(found, same, target.model, optimizer=True)
    if not fields:
        return check_fits(found, {**CONFIG, **change}, target.model, optimizer=True)
    with pytest.raises(SignalError) as caught:
        check_fits(found, {**CONFIG, **change}, target.model, optimizer=True, path="a.")
    assert caught.value.code == "state_mismatch"
    assert [detail.param for detail in caught.value.details] == [f"a.{name}" for name in fields]
    return None
