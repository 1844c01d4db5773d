"""A captured state: going on from it gives the same bits, and nothing that differs is taken for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import SignalError
from tests.unit.engine.support import make_rows, make_trainer, same, state
from workers.engine.base import Base, load_base
from workers.engine.certificate import certificate
from workers.engine.state import TrainerState, copies
from workers.engine.trainer import Trainer

Make = Callable[..., Trainer]
BATCHES = [make_rows((9, 30, 17), seed=seed) for seed in range(5)]
LAYER = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float64"])
def any_base(request: pytest.FixtureRequest, tiny: Path) -> Base:
    return load_base(tiny, dtype=request.param, threads=1)


def _first(run: Trainer) -> None:
    """A step, then half of an accumulation."""
    run.forward_backward(BATCHES[0], "cross_entropy", {}, True)
    run.optim_step()
    for batch in BATCHES[1:3]:
        run.forward_backward(batch, "causal_lm", {}, True)


def _rest(run: Trainer) -> list[dict[str, Any]]:
    return [
        run.forward_backward(BATCHES[3], "causal_lm", {}, True),
        run.optim_step(grad_clip_norm=0.5),
        run.forward_backward(BATCHES[4], "causal_lm", {}, True),
        run.optim_step(),
        run.forward_backward(BATCHES[0], "cross_entropy", {}, True),
    ]


def _through_json(saved: TrainerState) -> TrainerState:
    return TrainerState(saved.tensors, json.loads(json.dumps(saved.facts)))


def test_restored_equals_never_captured(any_base: Base) -> None:
    undisturbed, captured = make_trainer(any_base), make_trainer(any_base)
    # A run of another start, with a history of its own: all of it must be replaced.
    other = make_trainer(any_base, seed=9)
    other.forward_backward(BATCHES[4], "cross_entropy", {}, True)
    other.optim_step()
    for run in (undisturbed, captured):
        _first(run)
    saved = captured.capture()
    other.restore(_through_json(saved))
    assert other.accumulated == 2 and other.step == 1
    expected = _rest(undisturbed)
    assert _rest(captured) == expected
    assert _rest(other) == expected
    assert same(state(other), state(undisturbed)) and same(state(captured), state(undisturbed))
    hashes = certificate(undisturbed.capture())
    assert certificate(other.capture()) == certificate(captured.capture()) == hashes
    assert hashes["gradients"] is not None and hashes["step"] == 3


def test_a_state_is_a_copy(trainer: Make) -> None:
    run, other = trainer(), trainer(seed=5)
    _first(run)
    saved = run.capture()
    before = certificate(saved)
    _rest(run)
    assert certificate(saved) == before
    for _ in range(2):
        # Nor does the run that was restored from it change it.
        other.restore(saved)
        _rest(other)
        assert certificate(saved) == before
        assert certificate(other.capture()) == certificate(run.capture())


def test_without_an_accumulation_there_is_no_gradient(trainer: Make) -> None:
    run, other = trainer(), trainer()
    _first(other)
    saved = run.capture()
    assert set(saved.tensors) == {"master", "exp_avg", "exp_avg_sq"}
    assert saved.facts["accumulation"] is None and saved.step == 0
    assert saved.facts["optimizer"] == {"name": "adamw", "steps": 0}
    other.restore(saved)
    assert other.accumulated == 0 and other.step == 0
    with pytest.raises(SignalError, match="no_gradients"):
        other.optim_step()


def test_the_computing_copy_follows_the_master(tiny: Path) -> None:
    base = load_base(tiny, dtype="bfloat16", threads=1)
    run, other = make_trainer(base), make_trainer(base, seed=3)
    other.restore(run.capture())
    ours, theirs = (
        trainer.forward_backward(BATCHES[0], "causal_lm", {}) for trainer in (run, other)
    )
    assert ours == theirs


def test_the_layout_says_what_the_weights_are(trainer: Make) -> None:
    layout = trainer(targets=("v_proj", "q_proj"), r=3, alpha=6).capture().facts["layout"]
    assert layout["tensors"][0] == [LAYER, [3, 64]] and len(layout["tensors"]) == 8
    del layout["tensors"]
    assert layout == {
        "kind": "lora", "r": 3, "alpha": 6.0, "targets": ["v_proj", "q_proj"], "dtype": "float32",
    }  # fmt: skip


def _changed(saved: TrainerState, **changes: Any) -> TrainerState:
    """A deep copy with `path=value` put into its facts; the dots of the path are spelled __."""
    facts = json.loads(json.dumps(saved.facts))
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = facts
        for folder in folders:
            place = place[folder]
        if value is _GONE:
            del place[last]
        else:
            place[last] = value
    return TrainerState(dict(saved.tensors), facts)


_GONE = object()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layout__r": 8}, r"layout\.r is 8, in this run 4"),
        ({"layout__alpha": 1.0}, r"layout\.alpha is 1\.0, in this run 8\.0"),
        ({"layout__targets": ["q_proj"]}, r"layout\.targets"),
        ({"layout__dtype": "float64"}, r"layout\.dtype is 'float64'"),
        ({"layout__kind": "full"}, r"layout\.kind"),
        ({"layout__tensors": _GONE}, "the fact layout: tensors is missing"),
        ({"layout__dora": True}, "the fact layout: dora is unknown"),
        ({"layout": None}, "layout is not an object"),
        ({"optimizer__name": "muon"}, r"optimizer\.name is 'muon', in this run 'adamw'"),
        ({"optimizer__steps": -1}, r"optimizer\.steps is -1"),
        ({"optimizer__steps": True}, r"optimizer\.steps is True"),
        ({"optimizer__steps": _GONE}, "the fact optimizer: steps is missing"),
        ({"optimizer": []}, "optimizer is not an object"),
        ({"accumulation__calls": 0}, r"accumulation\.calls is 0"),
        ({"accumulation__weight": "1"}, r"accumulation\.weight is '1'"),
        ({"accumulation__reduction": "max"}, r"accumulation\.reduction is 'max'"),
        ({"accumulation__weight": _GONE}, "the fact accumulation: weight is missing"),
        ({"accumulation": 1}, "accumulation is not an object"),
        ({"accumulation": None}, "the tensor gradient is unknown"),
        ({"accumulation": _GONE}, "the fact accumulation is missing"),
        ({"schedule": {}}, "the fact schedule is unknown"),
    ],
)
def test_a_fact_that_differs_is_named_and_nothing_is_changed(
    trainer: Make, changes: dict[str, Any], named: str
) -> None:
    source, run = trainer(seed=2), trainer()
    for each in (source, run):
        _first(each)
    _refused(run, _changed(source.capture(), **changes), named)


def _refused(run: Trainer, saved: TrainerState, named: str) -> None:
    before, counts = state(run), (run.step, run.accumulated)
    with pytest.raises(SignalError, match=named) as caught:
        run.restore(saved)
    assert caught.value.code == "state_mismatch"
    assert same(before, state(run)) and counts == (run.step, run.accumulated)


def test_a_tensor_that_differs_is_named_and_nothing_is_changed(trainer: Make) -> None:
    source, run = trainer(seed=2), trainer()
    for each in (source, run):
        _first(each)
    saved = source.capture()
    for name in ("master", "exp_avg", "exp_avg_sq", "gradient"):
        tensor = saved.tensors[name]
        cases = [
            (tensor[:-1], f"the shape of {name}"),
            (tensor.unsqueeze(0), f"the shape of {name}"),
            (tensor.double(), f"the number format of {name} is 'float64', in this run 'float32'"),
        ]
        for other, named in cases:
            _refused(run, TrainerState({**saved.tensors, name: other}, saved.facts), named)
        left = {key: value for key, value in saved.tensors.items() if key != name}
        _refused(run, TrainerState(left, saved.facts), f"the tensor {name} is missing")
    more = {**saved.tensors, "max_exp_avg_sq": saved.tensors["exp_avg"]}
    _refused(run, TrainerState(more, saved.facts), "the tensor max_exp_avg_sq is unknown")
    run.restore(saved)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 8}, r"layout\.r is 4, in this run 8"),
        ({"alpha": 4.0}, r"layout\.alpha"),
        ({"targets": ("q_proj",)}, r"layout\.targets"),
    ],
)
def test_a_run_of_another_shape_refuses(trainer: Make, options: Any, named: str) -> None:
    _refused(trainer(**options), trainer().capture(), named)


def test_a_model_of_another_shape_names_the_layer(base: Base, tmp_path: Path) -> None:
    from tests.support.tiny import make_tiny_model

    wider = load_base(make_tiny_model(tmp_path / "wide", hidden=128), dtype="float32", threads=1)
    _refused(make_trainer(wider), make_trainer(base).capture(), LAYER)
    deeper = load_base(make_tiny_model(tmp_path / "deep", layers=3), dtype="float32", threads=1)
    _refused(make_trainer(deeper), make_trainer(base).capture(), r"layout\.tensors")
    double = load_base(tmp_path / "wide", dtype="float64", threads=1)
    _refused(make_trainer(double), make_trainer(wider).capture(), r"layout\.dtype is 'float32'")


def test_weights_alone_begin_anew(trainer: Make) -> None:
    run, other = trainer(), trainer(seed=4)
    for each in (run, other):
        _first(each)
    weights = run.adapter.flat(run.adapter.tensors())
    assert torch.equal(weights, run.adapter.master)
    for wrong, named in ((weights[1:], "the shape of master"), (weights.half(), "number format")):
        before = state(other)
        with pytest.raises(SignalError, match=named):
            other.restore_weights(wrong)
        assert same(before, state(other))
    other.restore_weights(weights)
    assert torch.equal(other.adapter.master, run.adapter.master)
    assert not other.optimizer.exp_avg.any() and not other.optimizer.exp_avg_sq.any()
    assert (other.step, other.accumulated) == (0, 0)


def test_a_state_cannot_be_given_other_parts(trainer: Make) -> None:
    saved = trainer().capture()
    with pytest.raises(dataclasses.FrozenInstanceError):
        saved.facts = {}  # type: ignore[misc]


def test_copies_are_contiguous_clones_of_any_format() -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.tensor(3, dtype=torch.uint8),
        "c": torch.zeros(0, dtype=torch.float64),
    }
    made = copies(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype
        assert not tensor.numel() or made[name].data_ptr() != tensor.data_ptr()
